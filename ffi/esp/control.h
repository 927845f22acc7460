/* The calls by which Python controls SAs and flows and carries bursts (natcompat/esp/datapath/native.py). */
#ifndef NATCOMPAT_ESP_CONTROL_H
#define NATCOMPAT_ESP_CONTROL_H

#include "esp/esp.h"

/* cffi: begin */
struct esp_sa;

enum esp_due { ESP_SOFT = 1, ESP_HARD = 2, ESP_MOVED = 4 };

/* What an SA is; limits of 0 are none. */
struct esp_parameters {
    uint64_t serial;           /* what packets are marked with; not 0 */
    uint32_t spi;
    uint8_t encryption, integrity;   /* IKEv2's numbers */
    uint8_t esn, copy_dscp, copy_ecn, copy_df;
    uint16_t tfc;
    uint32_t replay_window;    /* packets; inbound only */
    uint64_t sequence;         /* the last number that is not to be used, or to be taken, any more */
    uint64_t permitted;        /* outbound: the highest number that may be used until more are */
    uint64_t soft_packets, hard_packets, soft_bytes, hard_bytes;
    const uint8_t *key;        /* with its salt */
    size_t key_length;
    const uint8_t *mac_key;    /* of the integrity transform, if there is one */
    size_t mac_key_length;
    double added;              /* seconds since the epoch */
};

struct esp_usage {
    uint64_t packets, octets, replay_drops, window_drops, integrity_drops, sequence;
    double added, first_used, last_used;   /* the latter two only if there were packets */
    uint64_t serial;
    uint8_t gone, soft, due, moved;   /* moved: the newest packet came from elsewhere */
};

/* What selectors look at, as natcompat.esp.engine.packet.Flow. Addresses as in struct esp_endpoint. */
struct esp_flow {
    uint8_t source[16], destination[16];
    uint16_t source_port, destination_port;
    uint8_t version, protocol;
    uint8_t unused[2];
};

/* Where one packet of a joined burst is now. */
struct esp_view {
    uint64_t sa;
    uint32_t offset, length;
    uint8_t result, traffic_class, dont_fragment;
    uint8_t unused[5];
};

/* Returns a number that is this process's alone, also where a forked child has the same PID (PID namespaces). */
uint64_t esp_process_stamp(void);

/* Which library would do this transform: "ipsec-mb", "libcrypto", "ipsec-mb and libcrypto" (many packets at once and
 * few); NULL: Python has to. */
const char *esp_provider(struct esp_path *path, int encryption, int integrity, size_t key_length);

/* Encrypts or decrypts one packet with a key of its own, in place, for published vectors: `length` bytes
 * behind header and IV, and the integrity check value behind them. 0: not authentic; -1: not done here. */
int esp_crypt_once(struct esp_path *path, const struct esp_parameters *parameters, uint8_t *packet, size_t length,
                   const uint8_t *high, int sealing);

/* NULL: the path does not do this transform, or memory is short. Freed once, when no other call has it. */
struct esp_sa *esp_inbound_new(struct esp_path *path, const struct esp_parameters *parameters);
struct esp_sa *esp_outbound_new(struct esp_path *path, const struct esp_parameters *parameters);
void esp_sa_free(struct esp_sa *sa);

void esp_sa_place(struct esp_sa *sa, const struct esp_endpoint *peer, const struct esp_endpoint *local);
void esp_sa_permit(struct esp_sa *sa, uint64_t number);
void esp_sa_expire(struct esp_sa *sa, int hard);
void esp_sa_retire(struct esp_sa *sa);
int esp_sa_take_due(struct esp_sa *sa, struct esp_endpoint *moved_to);
void esp_sa_usage(struct esp_sa *sa, struct esp_usage *usage);

/* One packet of a known SA, in Python's own hands: no flows, no counters of the path. */
int esp_sa_open(struct esp_sa *sa, struct esp_packet *packet, double now);
int esp_sa_seal(struct esp_sa *sa, struct esp_packet *packet, double now);
int esp_sa_seal_dummy(struct esp_sa *sa, struct esp_packet *packet, double now);

/* IVs, one after the other, for all SAs that have a key. The memory is Python's; it stays until the SAs
 * that have been told of it are freed. */
void esp_sa_draw_ivs(struct esp_sa *sa, uint64_t *counter);
uint64_t esp_next_iv(uint64_t *counter);

/* What arrives with this SPI is for `sa`; NULL: for Python if `python`, else for nobody. 0: no memory. */
int esp_index(struct esp_path *path, uint32_t spi, struct esp_sa *sa, int python);

/* Serial of an SA that has something due, and no longer counts as pending; 0: there is none. */
uint64_t esp_due_next(struct esp_path *path);

/* Flows. What is learnt is void as soon as `esp_forget` has changed the generation; learning with an
 * old one does nothing. `used`: where the time of the last packet goes, or NULL; it has to be there
 * until the generation has changed. `verdict`: ESP_DONE, or why packets of the flow are dropped. */
uint64_t esp_generation(struct esp_path *path);
void esp_forget(struct esp_path *path);
void esp_admit(struct esp_path *path, uint64_t generation, const struct esp_flow *flow, struct esp_sa *sa,
               double *used, int verdict);
void esp_way(struct esp_path *path, uint64_t generation, const struct esp_flow *flow, struct esp_sa *sa,
             double *used, int verdict);

/* Packets that went no further, by result; `counters` has ESP_REASONS elements. */
void esp_counters(struct esp_path *path, uint64_t *counters);

/* Bursts as Python has them: packets one after the other, `lengths` tells them apart. Opened in place. */
int esp_open_joined(struct esp_path *path, uint8_t *packets, const uint32_t *lengths,
                    const struct esp_endpoint *peers, const uint8_t *traffic_classes, int count, double now,
                    struct esp_view *views);
/* `room`: of `sealed`, at least the packets, and ESP_ROOM and `spare` for each; `spare` is for TFC padding. */
int esp_seal_joined(struct esp_path *path, const uint8_t *packets, const uint32_t *lengths, int count, double now,
                    uint8_t *sealed, size_t room, uint32_t spare, struct esp_view *views);
#define ESP_ROOM 88   /* headroom and tailroom */
/* cffi: end */

_Static_assert(ESP_ROOM == ESP_HEADROOM + ESP_TAILROOM, "a packet's");

#endif
