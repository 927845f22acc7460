/* OpenSSL's libcrypto, 3.0 and later: AES-GCM and ChaCha20-Poly1305.
 *
 * Ciphers are fetched once per process and a context is made once per SA; a packet sets only the IV.
 * Looking up parameters by name is what EVP costs most per packet, so theirs are made once as well.
 */
#include "crypto/crypto.h"

#if WITH_LIBCRYPTO
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <pthread.h>
#include <string.h>

struct aead_key {
    EVP_CIPHER_CTX *context;
    uint8_t salt[4];
    uint8_t icv_length;
};

static EVP_CIPHER *aes_gcm[3], *chacha20_poly1305;

static void fetch(void)
{
    aes_gcm[0] = EVP_CIPHER_fetch(NULL, "AES-128-GCM", NULL);
    aes_gcm[1] = EVP_CIPHER_fetch(NULL, "AES-192-GCM", NULL);
    aes_gcm[2] = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    chacha20_poly1305 = EVP_CIPHER_fetch(NULL, "ChaCha20-Poly1305", NULL);   /* not in FIPS mode */
}

static EVP_CIPHER *fetched(const struct crypto_transform *transform)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fetch);
    switch (transform->encryption) {
    case ENCR_AES_GCM_8:
    case ENCR_AES_GCM_12:
    case ENCR_AES_GCM_16:
        return transform->key_length == 16 ? aes_gcm[0] : transform->key_length == 24 ? aes_gcm[1] : aes_gcm[2];
    case ENCR_CHACHA20_POLY1305: return chacha20_poly1305;
    }
    return NULL;
}

static bool aead_expand(void *memory, const struct crypto_transform *transform, const uint8_t *material,
                        const uint8_t *mac_key, size_t mac_key_length)
{
    struct aead_key *key = memory;
    EVP_CIPHER *cipher = fetched(transform);
    if (!cipher || transform->key_length != EVP_CIPHER_get_key_length(cipher))
        return false;
    key->icv_length = transform->icv_length;
    memcpy(key->salt, material + transform->key_length, sizeof key->salt);
    key->context = EVP_CIPHER_CTX_new();
    /* the direction is set with each packet; the key schedule is the same for both */
    return key->context && EVP_CipherInit_ex2(key->context, cipher, material, NULL, 1, NULL);
}

static bool start(const struct aead_key *key, const uint8_t *packet, const uint8_t *high, int sealing)
{
    uint8_t nonce[12], associated[12];
    int length;
    memcpy(nonce, key->salt, 4);
    memcpy(nonce + 4, packet + ESP_HEADER, 8);
    return EVP_CipherInit_ex2(key->context, NULL, NULL, nonce, sealing, NULL) &&
           EVP_CipherUpdate(key->context, NULL, &length, associated,
                            (int)crypto_associated(associated, packet, high));
}

static bool aead_seal(void *memory, uint8_t *packet, size_t length, const uint8_t *high)
{
    const struct aead_key *key = memory;
    uint8_t *text = packet + ESP_HEADER + 8;
    int written;
    OSSL_PARAM tag[] = {OSSL_PARAM_octet_string(OSSL_CIPHER_PARAM_AEAD_TAG, text + length, key->icv_length),
                        OSSL_PARAM_END};
    return start(key, packet, high, 1) && EVP_CipherUpdate(key->context, text, &written, text, (int)length) &&
           EVP_CipherFinal_ex(key->context, text + length, &written) &&
           EVP_CIPHER_CTX_get_params(key->context, tag);
}

static bool aead_open(void *memory, uint8_t *packet, size_t length, const uint8_t *high)
{
    const struct aead_key *key = memory;
    uint8_t *text = packet + ESP_HEADER + 8;
    int written;
    OSSL_PARAM tag[] = {OSSL_PARAM_octet_string(OSSL_CIPHER_PARAM_AEAD_TAG, text + length, key->icv_length),
                        OSSL_PARAM_END};
    /* the final step compares the tag, in constant time */
    return start(key, packet, high, 0) && EVP_CIPHER_CTX_set_params(key->context, tag) &&
           EVP_CipherUpdate(key->context, text, &written, text, (int)length) &&
           EVP_CipherFinal_ex(key->context, text + length, &written) > 0;
}

static void aead_wipe(void *memory)
{
    struct aead_key *key = memory;
    EVP_CIPHER_CTX_free(key->context);   /* wipes it */
    explicit_bzero(key, sizeof *key);
}

static const struct crypto_cipher aead = {"libcrypto", sizeof(struct aead_key), aead_expand, aead_seal, aead_open,
                                          aead_wipe,   NULL};

const struct crypto_cipher *crypto_libcrypto(const struct crypto_transform *transform)
{
    if (transform && transform->integrity)
        return &crypto_encrypt_then_mac;
    return !transform || fetched(transform) ? &aead : NULL;
}
#else
const struct crypto_cipher *crypto_libcrypto(const struct crypto_transform *transform)
{
    return NULL;
}
#endif
