/* Intel's Multi-Buffer Crypto for IPsec: AES-GCM and ChaCha20-Poly1305, one packet per call.
 * AES-CBC, which pays only for many packets at once, is in ipsec_mb_jobs.c.
 *
 * Of the library's manager only the table of functions is used here. These functions keep no state in it, so
 * any thread may call them.
 */
#include "crypto/crypto.h"

#if WITH_IPSEC_MB
#include <intel-ipsec-mb.h>
#include <pthread.h>
#include <string.h>

static IMB_MGR *manager;

static void load(void)
{
    manager = crypto_ipsec_mb_manager();
}

static size_t associate(uint8_t nonce[12], uint8_t associated[12], const uint8_t *salt, const uint8_t *packet,
                        const uint8_t *high)
{
    memcpy(nonce, salt, 4);
    memcpy(nonce + 4, packet + ESP_HEADER, 8);
    return crypto_associated(associated, packet, high);
}

/* AES-GCM (RFC 4106) */

struct gcm_key {
    struct gcm_key_data expanded;   /* first: the key expansion stores aligned */
    uint8_t salt[4];
    uint8_t icv_length, key_length;
};

static bool gcm_expand(void *memory, const struct crypto_transform *transform, const uint8_t *material,
                       const uint8_t *mac_key, size_t mac_key_length)
{
    struct gcm_key *key = memory;
    key->icv_length = transform->icv_length;
    key->key_length = transform->key_length;
    memcpy(key->salt, material + transform->key_length, sizeof key->salt);
    switch (transform->key_length) {
    case 16: manager->gcm128_pre(material, &key->expanded); return true;
    case 24: manager->gcm192_pre(material, &key->expanded); return true;
    case 32: manager->gcm256_pre(material, &key->expanded); return true;
    }
    return false;
}

static bool gcm_seal(void *memory, uint8_t *packet, size_t length, const uint8_t *high)
{
    const struct gcm_key *key = memory;
    struct gcm_context_data context;
    uint8_t nonce[12], associated[12], *text = packet + ESP_HEADER + 8;
    size_t associated_length = associate(nonce, associated, key->salt, packet, high);
    aes_gcm_enc_dec_t encrypt = key->key_length == 16   ? manager->gcm128_enc
                                : key->key_length == 24 ? manager->gcm192_enc
                                                        : manager->gcm256_enc;
    encrypt(&key->expanded, &context, text, text, length, nonce, associated, associated_length, text + length,
                 key->icv_length);
    return true;
}

static bool gcm_open(void *memory, uint8_t *packet, size_t length, const uint8_t *high)
{
    const struct gcm_key *key = memory;
    struct gcm_context_data context;
    uint8_t nonce[12], associated[12], icv[16], *text = packet + ESP_HEADER + 8;
    size_t associated_length = associate(nonce, associated, key->salt, packet, high);
    aes_gcm_enc_dec_t decrypt = key->key_length == 16   ? manager->gcm128_dec
                                : key->key_length == 24 ? manager->gcm192_dec
                                                        : manager->gcm256_dec;
    decrypt(&key->expanded, &context, text, text, length, nonce, associated, associated_length, icv,
                 key->icv_length);
    return crypto_equal(icv, text + length, key->icv_length);
}

static void gcm_wipe(void *memory)
{
    explicit_bzero(memory, sizeof(struct gcm_key));
}

static const struct crypto_cipher gcm = {"ipsec-mb", sizeof(struct gcm_key), gcm_expand, gcm_seal, gcm_open,
                                         gcm_wipe,   NULL};

/* ChaCha20-Poly1305 (RFC 7634) */

struct chacha_key {
    uint8_t key[32];
    uint8_t salt[4];
    uint8_t unused[28];   /* on AVX2 the library reads 16 bytes beyond the key */
};

static bool chacha_expand(void *memory, const struct crypto_transform *transform, const uint8_t *material,
                          const uint8_t *mac_key, size_t mac_key_length)
{
    struct chacha_key *key = memory;
    if (transform->key_length != sizeof key->key)
        return false;
    memcpy(key->key, material, sizeof key->key);
    memcpy(key->salt, material + sizeof key->key, sizeof key->salt);
    return true;
}

static void chacha(const struct chacha_key *key, uint8_t *packet, size_t length, const uint8_t *high,
                   chacha_poly_enc_dec_update_t update, uint8_t icv[16])
{
    struct chacha20_poly1305_context_data context;
    uint8_t nonce[12], associated[12], *text = packet + ESP_HEADER + 8;
    size_t associated_length = associate(nonce, associated, key->salt, packet, high);
    manager->chacha20_poly1305_init(key->key, &context, nonce, associated, associated_length);
    update(key->key, &context, text, text, length);
    manager->chacha20_poly1305_finalize(&context, icv, 16);
    explicit_bzero(&context, sizeof context);   /* it has the key of Poly1305 */
}

static bool chacha_seal(void *key, uint8_t *packet, size_t length, const uint8_t *high)
{
    chacha(key, packet, length, high, manager->chacha20_poly1305_enc_update, packet + ESP_HEADER + 8 + length);
    return true;
}

static bool chacha_open(void *key, uint8_t *packet, size_t length, const uint8_t *high)
{
    uint8_t icv[16];
    chacha(key, packet, length, high, manager->chacha20_poly1305_dec_update, icv);
    return crypto_equal(icv, packet + ESP_HEADER + 8 + length, sizeof icv);
}

static void chacha_wipe(void *memory)
{
    explicit_bzero(memory, sizeof(struct chacha_key));
}

static const struct crypto_cipher chacha20_poly1305 = {"ipsec-mb",  sizeof(struct chacha_key), chacha_expand,
                                                       chacha_seal, chacha_open,               chacha_wipe,
                                                       NULL};

const struct crypto_cipher *crypto_ipsec_mb(const struct crypto_transform *transform)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (!manager)
        return NULL;
    if (!transform)
        return &gcm;
    switch (transform->encryption) {
    case ENCR_AES_GCM_8:
    case ENCR_AES_GCM_12:
    case ENCR_AES_GCM_16: return &gcm;
    case ENCR_CHACHA20_POLY1305: return &chacha20_poly1305;
    }
    return NULL;
}
#else
const struct crypto_cipher *crypto_ipsec_mb(const struct crypto_transform *transform)
{
    return NULL;
}
#endif
