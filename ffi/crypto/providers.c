/* The choice of a provider for a transform. */
#include "crypto/crypto.h"

#include <string.h>

static const struct crypto_cipher *of_ipsec_mb(const struct crypto_transform *transform)
{
    const struct crypto_cipher *cipher = crypto_ipsec_mb(transform);
    /* jobs, where the library is here at all */
    return cipher || !transform || !crypto_ipsec_mb(NULL) ? cipher : crypto_jobs(transform);
}

const struct crypto_cipher *crypto_find(const char *provider, const struct crypto_transform *transform)
{
    const struct crypto_cipher *cipher = NULL;
    if (!provider || !strcmp(provider, "ipsec-mb"))
        cipher = of_ipsec_mb(transform);
    if (!cipher && (!provider || !strcmp(provider, "libcrypto")))
        cipher = crypto_libcrypto(transform);
    return cipher;
}
