/* Memory for keys, and the process that made it. */
#ifndef NATCOMPAT_ESP_SECRET_PRIVATE_H
#define NATCOMPAT_ESP_SECRET_PRIVATE_H

#include <stddef.h>
#include <stdint.h>

/* Returns `size` bytes of zeros, aligned to 64, that are in no core dump (MADV_DONTDUMP) and, as far as
 * RLIMIT_MEMLOCK permits, never in swap. NULL: there is no memory. */
void *secret_new(size_t size);

/* Wipes and frees what secret_new() returned for `size`. */
void secret_free(void *memory, size_t size);

/* Returns a number that is this process's alone: a forked child, even one with the same PID in another namespace, or
 * one that was made by clone(), gets another (MADV_WIPEONFORK, Linux 4.14; before that the PID). */
uint64_t process_stamp(void);

#endif
