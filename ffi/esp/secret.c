/* Memory for keys: arenas of pages that are kept out of core dumps and swap, cut into blocks of 64 bytes.
 *
 * What is freed is wiped at once and used again for the same size. Arenas stay until the process ends; there are as
 * many as the SAs of its busiest moment took.
 */
#define _GNU_SOURCE
#include "esp/secret_private.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18 /* Linux 4.14 */
#endif

enum { BLOCK = 64, CLASSES = 256, ARENA = 256 * 1024 };

struct block {
    struct block *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *unused[CLASSES];   /* by size in blocks */
static uint8_t *arena, *arena_end;
static uint64_t *stamp;   /* in a page that is empty again in a forked child */

static void hold(void)
{
    pthread_mutex_lock(&lock);
}

static void release(void)
{
    pthread_mutex_unlock(&lock);
}

/* A fork while another thread is in here must not leave the child a list that is half changed. */
__attribute__((constructor)) static void prepare_for_fork(void)
{
    pthread_atfork(hold, release, release);
}

static void *map(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, size, MADV_DONTDUMP);
    (void)!mlock(memory, size);   /* EPERM, ENOMEM: more than this process may lock */
    return memory;
}

void *secret_new(size_t size)
{
    size_t blocks = (size + BLOCK - 1) / BLOCK;
    void *memory = NULL;
    if (blocks >= CLASSES)
        return map(size);
    hold();
    if (unused[blocks]) {
        memory = unused[blocks];
        unused[blocks] = unused[blocks]->next;
    } else {
        if ((size_t)(arena_end - arena) < blocks * BLOCK) {   /* what is left of the old one is too small, and stays so */
            uint8_t *mapped = map(ARENA);
            if (mapped) {
                arena = mapped;
                arena_end = mapped + ARENA;
            }
        }
        if ((size_t)(arena_end - arena) >= blocks * BLOCK) {
            memory = arena;
            arena += blocks * BLOCK;
        }
    }
    release();
    if (memory)
        memset(memory, 0, sizeof(struct block));
    return memory;
}

void secret_free(void *memory, size_t size)
{
    size_t blocks = (size + BLOCK - 1) / BLOCK;
    explicit_bzero(memory, size);
    if (blocks >= CLASSES) {
        munmap(memory, size);
        return;
    }
    hold();
    ((struct block *)memory)->next = unused[blocks];
    unused[blocks] = memory;
    release();
}

uint64_t process_stamp(void)
{
    uint64_t found;
    hold();
    if (!stamp) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        void *memory = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory != MAP_FAILED && madvise(memory, page, MADV_WIPEONFORK) == 0)
            stamp = memory;
        else if (memory != MAP_FAILED)
            munmap(memory, page);
    }
    if (stamp && !*stamp && getrandom(stamp, sizeof *stamp, 0) != sizeof *stamp)
        *stamp = 0;
    found = stamp && *stamp ? *stamp : (uint64_t)getpid();
    release();
    return found;
}
