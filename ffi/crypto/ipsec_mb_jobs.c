/* AES-CBC with HMAC, many packets at once: the jobs of ipsec-mb, one in each lane of the processor's vectors.
 *
 * One packet is faster by libcrypto, so every key has one for that as well. What keeps jobs is a manager, for one
 * thread at a time. There are a few, and who finds none free goes on with libcrypto: no thread waits for another.
 */
#include "crypto/crypto.h"

#if WITH_IPSEC_MB && WITH_LIBCRYPTO
#include <intel-ipsec-mb.h>
#include <pthread.h>
#include <string.h>
#include <sys/random.h>

enum { MANAGERS = 4 };   /* 200 KB each */

static struct manager {
    IMB_MGR *jobs;   /* NULL: memory was short */
    bool taken;
} managers[MANAGERS];

static void make_managers(void)
{
    for (int each = 0; each < MANAGERS; ++each)
        managers[each].jobs = crypto_ipsec_mb_manager();
}

static struct manager *take(void)
{
    for (struct manager *each = managers; each < managers + MANAGERS; ++each)
        if (each->jobs && !__atomic_test_and_set(&each->taken, __ATOMIC_ACQUIRE))
            return each;
    return NULL;
}

struct job_key {
    _Alignas(16) uint8_t rounds[15 * 16];
    _Alignas(16) uint8_t inner[64], outer[64];   /* the hash behind the padded key (RFC 2104) */
    uint64_t number[2];   /* as in crypto_libcrypto_mac.c */
    IMB_HASH_ALG hash;
    uint8_t key_length, icv_length;
};                        /* libcrypto's key is behind it */

static void *single(void *key)
{
    return (struct job_key *)key + 1;
}

static bool expand_mac(struct job_key *key, IMB_MGR *jobs, uint8_t integrity, const uint8_t *mac_key, size_t length)
{
    size_t block = 64;
    hash_one_block_t hash;
    switch (integrity) {
    case AUTH_HMAC_SHA1_96: key->hash = IMB_AUTH_HMAC_SHA_1, hash = jobs->sha1_one_block; break;
    case AUTH_HMAC_SHA2_256_128: key->hash = IMB_AUTH_HMAC_SHA_256, hash = jobs->sha256_one_block; break;
    case AUTH_HMAC_SHA2_384_192: key->hash = IMB_AUTH_HMAC_SHA_384, hash = jobs->sha384_one_block, block = 128; break;
    case AUTH_HMAC_SHA2_512_256: key->hash = IMB_AUTH_HMAC_SHA_512, hash = jobs->sha512_one_block, block = 128; break;
    default: return false;
    }
    if (length > block)
        return false;
    uint8_t padded[128];
    for (int outer = 0; outer < 2; ++outer) {
        memset(padded, outer ? 0x5C : 0x36, block);
        for (size_t each = 0; each < length; ++each)
            padded[each] ^= mac_key[each];
        hash(padded, outer ? key->outer : key->inner);
    }
    explicit_bzero(padded, sizeof padded);
    return true;
}

static bool jobs_expand(void *memory, const struct crypto_transform *transform, const uint8_t *material,
                        const uint8_t *mac_key, size_t mac_key_length)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_managers);
    IMB_MGR *jobs = managers[0].jobs;   /* of it, the table of functions */
    struct job_key *key = memory;
    _Alignas(16) uint8_t decrypting[sizeof key->rounds];
    if (!crypto_encrypt_then_mac.expand(single(key), transform, material, mac_key, mac_key_length) || !jobs)
        return false;
    key->key_length = transform->key_length;
    key->icv_length = transform->icv_length;
    (key->key_length == 16   ? jobs->keyexp_128
     : key->key_length == 24 ? jobs->keyexp_192
                             : jobs->keyexp_256)(material, key->rounds, decrypting);
    explicit_bzero(decrypting, sizeof decrypting);
    return expand_mac(key, jobs, transform->integrity, mac_key, mac_key_length) &&
           getrandom(key->number, sizeof key->number, 0) == sizeof key->number;
}

static void jobs_wipe(void *key)
{
    crypto_encrypt_then_mac.wipe(single(key));
    explicit_bzero(key, sizeof(struct job_key));
}

static bool jobs_seal(void *key, uint8_t *packet, size_t length, const uint8_t *high)
{
    return crypto_encrypt_then_mac.seal(single(key), packet, length, high);
}

static bool jobs_open(void *key, uint8_t *packet, size_t length, const uint8_t *high)
{
    return crypto_encrypt_then_mac.open(single(key), packet, length, high);
}

/* The blocks of one packet can be decrypted side by side: there is nothing to gain from others. */
static bool open_known(void *key, uint8_t *packet, size_t length, const uint8_t *icv)
{
    const struct job_key *known = key;
    return crypto_equal(icv, packet + ESP_HEADER + 16 + length, known->icv_length) &&
           crypto_mac_decrypt(single(key), packet, length);
}

static uint8_t *behind(const struct crypto_job *what)
{
    return what->packet + ESP_HEADER + 16 + what->length;
}

/* The upper half of an ESN counts as if it stood behind the text, so it stands there meanwhile. */
static void authenticate(IMB_JOB *job, struct crypto_job *what, uint8_t *icv)
{
    const struct job_key *key = what->key;
    memcpy(what->kept, behind(what), sizeof what->kept);
    if (what->esn)
        memcpy(behind(what), what->high, sizeof what->high);
    job->src = what->packet;
    job->hash_alg = key->hash;
    job->u.HMAC._hashed_auth_key_xor_ipad = key->inner;
    job->u.HMAC._hashed_auth_key_xor_opad = key->outer;
    job->hash_start_src_offset_in_bytes = 0;
    job->msg_len_to_hash_in_bytes = (size_t)(behind(what) - what->packet) + (what->esn ? sizeof what->high : 0);
    job->auth_tag_output = icv;
    job->auth_tag_output_len_in_bytes = key->icv_length;
    job->cipher_mode = IMB_CIPHER_NULL;
    job->chain_order = IMB_ORDER_CIPHER_HASH;
    job->user_data = what;
}

/* The IV is part of the text, under one of zero, as in crypto_libcrypto_mac.c. */
static void encrypt(IMB_JOB *job, struct crypto_job *what)
{
    static const _Alignas(16) uint8_t zero[16];
    struct job_key *key = what->key;
    uint8_t *iv = what->packet + ESP_HEADER;
    uint64_t number = __atomic_fetch_add(&key->number[0], 1, __ATOMIC_RELAXED);
    memcpy(iv, &number, 8);
    memcpy(iv + 8, &key->number[1], 8);
    job->cipher_mode = IMB_CIPHER_CBC;
    job->cipher_direction = IMB_DIR_ENCRYPT;
    job->enc_keys = job->dec_keys = key->rounds;
    job->key_len_in_bytes = key->key_length;
    job->iv = zero;
    job->iv_len_in_bytes = 16;
    job->dst = iv;
    job->cipher_start_src_offset_in_bytes = ESP_HEADER;
    job->msg_len_to_cipher_in_bytes = 16 + what->length;
}

static void note(IMB_MGR *jobs, IMB_JOB *job)
{
    for (; job; job = IMB_GET_COMPLETED_JOB(jobs))
        ((struct crypto_job *)job->user_data)->done = job->status == IMB_STATUS_COMPLETED;
}

static bool work(struct crypto_job *list, int count, bool sealing)
{
    struct manager *manager = take();
    if (!manager)
        return false;
    for (struct crypto_job *each = list; each < list + count; ++each) {
        IMB_JOB *job = IMB_GET_NEXT_JOB(manager->jobs);
        each->done = false;
        authenticate(job, each, sealing ? behind(each) : each->icv);
        if (sealing)
            encrypt(job, each);
        note(manager->jobs, IMB_SUBMIT_JOB(manager->jobs));
    }
    for (IMB_JOB *job; (job = IMB_FLUSH_JOB(manager->jobs));)
        note(manager->jobs, job);
    __atomic_clear(&manager->taken, __ATOMIC_RELEASE);
    for (struct crypto_job *each = list; each < list + count && !sealing; ++each)
        memcpy(behind(each), each->kept, sizeof each->kept);
    return true;
}

static const struct crypto_many many = {work, open_known};
static struct crypto_cipher cipher = {"ipsec-mb and libcrypto", 0, jobs_expand, jobs_seal, jobs_open, jobs_wipe, &many};

static void size(void)
{
    cipher.key_size = sizeof(struct job_key) + crypto_encrypt_then_mac.key_size;
}

const struct crypto_cipher *crypto_jobs(const struct crypto_transform *transform)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, size);
    return transform->encryption != ENCR_AES_CBC || transform->integrity == AUTH_AES_CMAC_96 ? NULL : &cipher;
}
#else
const struct crypto_cipher *crypto_jobs(const struct crypto_transform *transform)
{
    return NULL;
}
#endif
