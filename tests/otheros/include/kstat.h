/* What ffi/solaris/build_solaris.py takes of Solaris' kstat.h and sys/kstat.h, written from kstat(3KSTAT). */
#pragma once
#include <stdint.h>

#define KSTAT_STRLEN 31
#define KSTAT_DATA_CHAR 0
#define KSTAT_DATA_INT32 1
#define KSTAT_DATA_UINT32 2
#define KSTAT_DATA_INT64 3
#define KSTAT_DATA_UINT64 4

typedef int kid_t;

typedef struct kstat {
	long long ks_crtime;
	struct kstat *ks_next;
	kid_t ks_kid;
	char ks_module[KSTAT_STRLEN];
	unsigned char ks_resv;
	int ks_instance;
	char ks_name[KSTAT_STRLEN];
	unsigned char ks_type;
	char ks_class[KSTAT_STRLEN];
	unsigned char ks_flags;
	void *ks_data;
} kstat_t;

typedef struct kstat_ctl {
	kid_t kc_chain_id;
	kstat_t *kc_chain;
	int kc_kd;
} kstat_ctl_t;

typedef struct kstat_named {
	char name[KSTAT_STRLEN];
	unsigned char data_type;
	union {
		char c[16];
		int32_t i32;
		uint32_t ui32;
		int64_t i64;
		uint64_t ui64;
	} value;
} kstat_named_t;

kstat_ctl_t *kstat_open(void);
int kstat_close(kstat_ctl_t *);
kstat_t *kstat_lookup(kstat_ctl_t *, char *, int, char *);
kid_t kstat_read(kstat_ctl_t *, kstat_t *, void *);
void *kstat_data_lookup(kstat_t *, char *);
