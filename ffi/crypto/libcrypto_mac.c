/* An encryption transform and an integrity transform over it (RFC 4303, 3.3.2), by libcrypto.
 *
 * The IV of CBC has to be unpredictable. It is a number that is used once, encrypted with the key itself
 * (NIST SP 800-38A, appendix C): a block in front of the text, under an IV of zero, so it costs one block.
 */
#include "crypto/crypto.h"

#if WITH_LIBCRYPTO
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/rand.h>
#include <pthread.h>
#include <string.h>

struct mac_key {
    EVP_CIPHER_CTX *cipher;   /* NULL: nothing is encrypted */
    EVP_MAC_CTX *mac;
    uint64_t number[2];       /* begins at random and counts; what the IVs of CBC are made of */
    uint8_t salt[4];
    uint8_t encryption, iv_length, icv_length;
};

static EVP_CIPHER *aes_cbc[3], *aes_ctr[3];
static EVP_MAC *hmac, *cmac;

static void fetch(void)
{
    static const char *const cbc[] = {"AES-128-CBC", "AES-192-CBC", "AES-256-CBC"};
    static const char *const ctr[] = {"AES-128-CTR", "AES-192-CTR", "AES-256-CTR"};
    for (int each = 0; each < 3; ++each) {
        aes_cbc[each] = EVP_CIPHER_fetch(NULL, cbc[each], NULL);
        aes_ctr[each] = EVP_CIPHER_fetch(NULL, ctr[each], NULL);
    }
    hmac = EVP_MAC_fetch(NULL, "HMAC", NULL);
    cmac = EVP_MAC_fetch(NULL, "CMAC", NULL);
}

static bool expand_mac(struct mac_key *key, const struct crypto_transform *transform, const uint8_t *mac_key,
                       size_t length)
{
    EVP_MAC *mac = transform->integrity == AUTH_AES_CMAC_96 ? cmac : hmac;
    const char *parameter = mac == cmac ? OSSL_MAC_PARAM_CIPHER : OSSL_MAC_PARAM_DIGEST, *algorithm = NULL;
    switch (transform->integrity) {
    case AUTH_AES_CMAC_96: algorithm = "AES-128-CBC"; break;
    case AUTH_HMAC_SHA1_96: algorithm = "SHA1"; break;
    case AUTH_HMAC_SHA2_256_128: algorithm = "SHA2-256"; break;
    case AUTH_HMAC_SHA2_384_192: algorithm = "SHA2-384"; break;
    case AUTH_HMAC_SHA2_512_256: algorithm = "SHA2-512"; break;
    }
    OSSL_PARAM parameters[] = {OSSL_PARAM_construct_utf8_string(parameter, (char *)algorithm, 0), OSSL_PARAM_END};
    key->mac = mac && algorithm ? EVP_MAC_CTX_new(mac) : NULL;
    return key->mac && EVP_MAC_init(key->mac, mac_key, length, parameters);
}

static bool mac_expand(void *memory, const struct crypto_transform *transform, const uint8_t *material,
                       const uint8_t *mac_key, size_t mac_key_length)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fetch);
    struct mac_key *key = memory;
    key->encryption = transform->encryption;
    key->iv_length = transform->iv_length;
    key->icv_length = transform->icv_length;
    memcpy(key->salt, material + transform->key_length, transform->salt_length);
    if (transform->encryption != ENCR_NULL) {
        int size = transform->key_length / 8 - 2;
        EVP_CIPHER *cipher = size < 0 || size > 2                         ? NULL
                             : transform->encryption == ENCR_AES_CBC ? aes_cbc[size]
                                                                     : aes_ctr[size];
        key->cipher = cipher ? EVP_CIPHER_CTX_new() : NULL;
        if (!key->cipher || !EVP_CipherInit_ex2(key->cipher, cipher, material, NULL, transform->sealing, NULL) ||
            !EVP_CIPHER_CTX_set_padding(key->cipher, 0) ||
            RAND_bytes((unsigned char *)key->number, sizeof key->number) != 1)
            return false;
    }
    return expand_mac(key, transform, mac_key, mac_key_length);
}

/* Computes what the integrity check value is; `icv` has room for any. */
static bool compute(const struct mac_key *key, const uint8_t *packet, size_t length, const uint8_t *high,
                    uint8_t icv[EVP_MAX_MD_SIZE])
{
    size_t written;
    return EVP_MAC_init(key->mac, NULL, 0, NULL) &&   /* the same key again */
           EVP_MAC_update(key->mac, packet, ESP_HEADER + key->iv_length + length) &&
           (!high || EVP_MAC_update(key->mac, high, 4)) &&
           EVP_MAC_final(key->mac, icv, &written, EVP_MAX_MD_SIZE) && written >= key->icv_length;
}

/* AES-CTR, RFC 3686: both ways. */
static bool count(const struct mac_key *key, uint8_t *packet, size_t length)
{
    uint8_t block[16] = {[15] = 1}, *text = packet + ESP_HEADER + 8;
    int written;
    memcpy(block, key->salt, 4);
    memcpy(block + 4, packet + ESP_HEADER, 8);
    return EVP_CipherInit_ex2(key->cipher, NULL, NULL, block, -1, NULL) &&
           EVP_CipherUpdate(key->cipher, text, &written, text, (int)length);
}

static bool mac_seal(void *memory, uint8_t *packet, size_t length, const uint8_t *high)
{
    static const uint8_t zero[16];
    struct mac_key *key = memory;
    uint8_t icv[EVP_MAX_MD_SIZE], *iv = packet + ESP_HEADER;
    int written;
    if (key->encryption == ENCR_AES_CTR && !count(key, packet, length))
        return false;
    if (key->encryption == ENCR_AES_CBC) {
        memcpy(iv, key->number, 16);
        ++key->number[0];
        if (!EVP_CipherInit_ex2(key->cipher, NULL, NULL, zero, -1, NULL) ||
            !EVP_CipherUpdate(key->cipher, iv, &written, iv, (int)length + 16))
            return false;
    }
    if (!compute(key, packet, length, high, icv))
        return false;
    memcpy(iv + key->iv_length + length, icv, key->icv_length);
    return true;
}

bool crypto_mac_decrypt(void *memory, uint8_t *packet, size_t length)
{
    const struct mac_key *key = memory;
    uint8_t *iv = packet + ESP_HEADER, *text = iv + key->iv_length;
    int written;
    switch (key->encryption) {
    case ENCR_AES_CTR: return count(key, packet, length);
    case ENCR_AES_CBC:
        return EVP_CipherInit_ex2(key->cipher, NULL, NULL, iv, -1, NULL) &&
               EVP_CipherUpdate(key->cipher, text, &written, text, (int)length);
    }
    return true;
}

static bool mac_open(void *memory, uint8_t *packet, size_t length, const uint8_t *high)
{
    const struct mac_key *key = memory;
    uint8_t icv[EVP_MAX_MD_SIZE];
    return compute(key, packet, length, high, icv) &&
           crypto_equal(icv, packet + ESP_HEADER + key->iv_length + length, key->icv_length) &&
           crypto_mac_decrypt(memory, packet, length);
}

static void mac_wipe(void *memory)
{
    struct mac_key *key = memory;
    EVP_CIPHER_CTX_free(key->cipher);   /* wipes it */
    EVP_MAC_CTX_free(key->mac);
    explicit_bzero(key, sizeof *key);
}

const struct crypto_cipher crypto_encrypt_then_mac = {"libcrypto", sizeof(struct mac_key), mac_expand, mac_seal,
                                                      mac_open,    mac_wipe,               NULL};
#endif
