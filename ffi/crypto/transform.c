/* The table of transforms (lengths on the wire), and the helpers that all providers share. */
#include "crypto/crypto.h"

#include <string.h>

/* The integrity check value is that of the integrity transform where there is one. */
static const struct crypto_transform encryptions[] = {
    {.encryption = ENCR_NULL, .block_length = 1},
    {.encryption = ENCR_AES_CBC, .iv_length = 16, .block_length = 16},
    {.encryption = ENCR_AES_CTR, .iv_length = 8, .block_length = 1, .salt_length = 4},
    {.encryption = ENCR_AES_GCM_8, .iv_length = 8, .icv_length = 8, .block_length = 1, .salt_length = 4},
    {.encryption = ENCR_AES_GCM_12, .iv_length = 8, .icv_length = 12, .block_length = 1, .salt_length = 4},
    {.encryption = ENCR_AES_GCM_16, .iv_length = 8, .icv_length = 16, .block_length = 1, .salt_length = 4},
    {.encryption = ENCR_CHACHA20_POLY1305, .iv_length = 8, .icv_length = 16, .block_length = 1, .salt_length = 4},
};

static uint8_t icv_length(int integrity)
{
    switch (integrity) {
    case AUTH_HMAC_SHA1_96:
    case AUTH_AES_CMAC_96: return 12;
    case AUTH_HMAC_SHA2_256_128: return 16;
    case AUTH_HMAC_SHA2_384_192: return 24;
    case AUTH_HMAC_SHA2_512_256: return 32;
    }
    return 0;
}

bool crypto_describe(struct crypto_transform *transform, int encryption, int integrity, size_t key_length)
{
    for (size_t each = 0; each < sizeof encryptions / sizeof *encryptions; ++each) {
        if (encryptions[each].encryption != encryption)
            continue;
        *transform = encryptions[each];
        if (key_length < transform->salt_length || key_length > 255)
            return false;
        transform->key_length = (uint8_t)(key_length - transform->salt_length);
        if (transform->icv_length)
            return integrity == AUTH_NONE;
        transform->integrity = (uint8_t)integrity;
        transform->icv_length = icv_length(integrity);
        return transform->icv_length;   /* nothing goes without integrity (RFC 8221, 4) */
    }
    return false;
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
