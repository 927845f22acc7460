/* The ciphers of ESP: one small interface, one file per library.
 *
 * Whole ESP packets go in, since that is what every transform can do by itself: header (8 bytes), IV,
 * text, and behind it room for the integrity check value. All in place.
 */
#ifndef NATCOMPAT_CRYPTO_H
#define NATCOMPAT_CRYPTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ESP_HEADER 8   /* SPI and sequence number */

/* Encryption transforms (IANA, IKEv2 transform type 1), as in natcompat.ipsec.transforms. */
enum {
    ENCR_NULL = 11,
    ENCR_AES_CBC = 12,
    ENCR_AES_CTR = 13,
    ENCR_AES_GCM_8 = 18,
    ENCR_AES_GCM_12 = 19,
    ENCR_AES_GCM_16 = 20,
    ENCR_CHACHA20_POLY1305 = 28,
};

/* Integrity transforms (IANA, IKEv2 transform type 3). */
enum {
    AUTH_NONE = 0,
    AUTH_HMAC_SHA1_96 = 2,
    AUTH_AES_CMAC_96 = 8,
    AUTH_HMAC_SHA2_256_128 = 12,
    AUTH_HMAC_SHA2_384_192 = 13,
    AUTH_HMAC_SHA2_512_256 = 14,
};

/* What a transform looks like on the wire. */
struct crypto_transform {
    uint8_t encryption, integrity;   /* IKEv2's numbers */
    uint8_t iv_length, icv_length, block_length, salt_length;
    uint8_t key_length;   /* without the salt */
    bool sealing;         /* which way the key is for */
};

/* One packet of many: header, IV, `length` bytes and the integrity check value. */
struct crypto_job {
    void *key;
    uint8_t *packet;
    size_t length;
    bool esn, done;          /* done: out */
    uint8_t high[4];         /* of the ESN */
    uint8_t kept[4];         /* what stands where that has to stand */
    uint8_t icv[32];         /* opening, out: what the integrity check value has to be */
};

/* How packets, each with its key, are done at once: the same for all ciphers that have it. It pays from FEWEST_JOBS
 * on; MOST_JOBS fill the widest vectors, with a hash of 32 bits in each lane. */
enum { FEWEST_JOBS = 8, MOST_JOBS = 16 };

struct crypto_many {
    /* Seals, or computes check values, which leaves packets as they were. False: not now, nothing was done. */
    bool (*work)(struct crypto_job *jobs, int count, bool sealing);
    /* As a cipher's `open`, with the check value that was computed. */
    bool (*open)(void *key, uint8_t *packet, size_t length, const uint8_t *icv);
};

/* How one library does one transform. `key`: the keys of one SA, used by one thread at a time. */
struct crypto_cipher {
    const char *provider;
    size_t key_size;
    /* Sets up `key`, zeroed memory of that size, aligned to 64 if it is as large. `material`: the key and its salt. */
    bool (*expand)(void *key, const struct crypto_transform *transform, const uint8_t *material,
                   const uint8_t *mac_key, size_t mac_key_length);
    /* Encrypts the `length` bytes behind header and IV, and appends the integrity check value.
     * `high`: four bytes, the upper half of an ESN, or NULL. False: it failed, nothing is to be sent. */
    bool (*seal)(void *key, uint8_t *packet, size_t length, const uint8_t *high);
    /* Decrypts as many bytes. False: not authentic, and what stands there now is to be thrown away. */
    bool (*open)(void *key, uint8_t *packet, size_t length, const uint8_t *high);
    /* Wipes what is secret and frees what `expand` took. */
    void (*wipe)(void *key);
    const struct crypto_many *many;   /* NULL: one after the other */
};

/* NULL: this library does not do this transform here (NULL: any). */
const struct crypto_cipher *crypto_ipsec_mb(const struct crypto_transform *transform);
const struct crypto_cipher *crypto_libcrypto(const struct crypto_transform *transform);

/* Parts of them in files of their own. The first takes both libraries. */
const struct crypto_cipher *crypto_jobs(const struct crypto_transform *transform);
extern const struct crypto_cipher crypto_encrypt_then_mac;

void *crypto_ipsec_mb_manager(void);   /* a new IMB_MGR *, or NULL */
bool crypto_mac_decrypt(void *key, uint8_t *packet, size_t length);   /* what is authentic */

/* Fills in the transform of a key of `key_length` bytes, salt included; false: it is not one of these. */
bool crypto_describe(struct crypto_transform *transform, int encryption, int integrity, size_t key_length);

/* How `transform` (NULL: any) is done by the library `provider`; NULL: by the fastest that can. */
const struct crypto_cipher *crypto_find(const char *provider, const struct crypto_transform *transform);

/* Of a packet: SPI and sequence number, the ESN whole if it has one (RFC 4106, 5). Returns the length. */
size_t crypto_associated(uint8_t associated[12], const uint8_t *packet, const uint8_t *high);

/* Compares in a time that depends on nothing but `length`. */
bool crypto_equal(const uint8_t *one, const uint8_t *other, size_t length);

#endif
