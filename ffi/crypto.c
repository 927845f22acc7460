/* What the providers have in common, and which one does what. */
#include "crypto.h"

#include <string.h>

static const struct crypto_transform transforms[] = {
    {.encryption = ENCR_AES_GCM_8, .iv_length = 8, .icv_length = 8, .block_length = 1, .salt_length = 4, .counts = true},
    {.encryption = ENCR_AES_GCM_12, .iv_length = 8, .icv_length = 12, .block_length = 1, .salt_length = 4, .counts = true},
    {.encryption = ENCR_AES_GCM_16, .iv_length = 8, .icv_length = 16, .block_length = 1, .salt_length = 4, .counts = true},
    {.encryption = ENCR_CHACHA20_POLY1305, .iv_length = 8, .icv_length = 16, .block_length = 1, .salt_length = 4, .counts = true},
};

bool crypto_describe(struct crypto_transform *transform, int encryption, int integrity, size_t key_length)
{
    for (size_t each = 0; each < sizeof transforms / sizeof *transforms; ++each) {
        if (transforms[each].encryption != encryption || transforms[each].integrity != integrity)
            continue;
        *transform = transforms[each];
        if (key_length < transform->salt_length || key_length > 255)
            return false;
        transform->key_length = (uint8_t)(key_length - transform->salt_length);
        return true;
    }
    return false;
}

const struct crypto_cipher *crypto_find(const char *provider, const struct crypto_transform *transform)
{
    const struct crypto_cipher *ciphers[] = {crypto_ipsec_mb(transform), crypto_libcrypto(transform)};
    for (size_t each = 0; each < sizeof ciphers / sizeof *ciphers; ++each)
        if (ciphers[each] && (!provider || !strcmp(provider, ciphers[each]->provider)))
            return ciphers[each];
    return NULL;
}

size_t crypto_associated(uint8_t associated[12], const uint8_t *packet, const uint8_t *high)
{
    memcpy(associated, packet, 4);
    if (!high) {
        memcpy(associated + 4, packet + 4, 4);
        return 8;
    }
    memcpy(associated + 4, high, 4);
    memcpy(associated + 8, packet + 4, 4);
    return 12;
}

bool crypto_equal(const uint8_t *one, const uint8_t *other, size_t length)
{
    uint64_t difference = 0;
    for (; length >= 8; one += 8, other += 8, length -= 8) {
        uint64_t a, b;
        memcpy(&a, one, 8);
        memcpy(&b, other, 8);
        difference |= a ^ b;
        __asm__("" : "+r"(difference));   /* the compiler does not see that more cannot make it zero again */
    }
    for (; length; ++one, ++other, --length)
        difference |= *one ^ *other;
    __asm__("" : "+r"(difference));
    return difference == 0;
}
