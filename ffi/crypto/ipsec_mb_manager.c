/* Loads Intel's Multi-Buffer Crypto for IPsec and makes managers of it.
 *
 * The library is found when the module is loaded, not when it is built, so that one build works with and
 * without it.
 */
#include "crypto/crypto.h"

#if WITH_IPSEC_MB
#include <dlfcn.h>
#include <intel-ipsec-mb.h>

static void *find(void *library, const char *name)
{
    return library ? dlsym(library, name) : NULL;
}

void *crypto_ipsec_mb_manager(void)
{
    void *library = dlopen("libIPSec_MB.so.1", RTLD_NOW | RTLD_LOCAL);
    unsigned (*version)(void) = (unsigned (*)(void))find(library, "imb_get_version");
    IMB_MGR *(*allocate)(uint64_t) = (IMB_MGR * (*)(uint64_t)) find(library, "alloc_mb_mgr");
    void (*start)(IMB_MGR *, IMB_ARCH *) = (void (*)(IMB_MGR *, IMB_ARCH *))find(library, "init_mb_mgr_auto");
    int (*failed)(IMB_MGR *) = (int (*)(IMB_MGR *))find(library, "imb_get_errno");
    void (*release)(IMB_MGR *) = (void (*)(IMB_MGR *))find(library, "free_mb_mgr");
    /* the table only grows at its end: with the version of the header all of it is there */
    if (!version || !allocate || !start || !failed || !release || version() < IMB_VERSION_NUM)
        return NULL;
    IMB_MGR *made = allocate(0);
    if (!made)
        return NULL;
    IMB_ARCH architecture = IMB_ARCH_NONE;
    start(made, &architecture);
    if (architecture != IMB_ARCH_NONE && !failed(made))
        return made;
    release(made);   /* this processor is too old */
    return NULL;
}
#endif
