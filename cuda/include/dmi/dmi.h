/* dmi.h: libdmi's C interface: rings, steps and captures, without a word of torch. The torch op (torch/op.cpp) and
 * Python (dmi/native.py, by ctypes) both come in through here; abi/ring.h says what the engine sees of it.
 *
 * A ring is named by a handle, a positive number that is never used again. A handle that is closed, unknown or
 * inherited by a forked child is not an error for dmi_capture: the op does nothing and counts.
 *
 * Functions that can fail return a negative dmi_status and leave a message for dmi_last_error() of the same thread.
 */
#ifndef DMI_DMI_H
#define DMI_DMI_H

#include <stdint.h>

#include "abi/ring.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DMI_API __attribute__((visibility("default")))

enum dmi_status {
  DMI_OK = 0,
  DMI_ERROR_INVALID = -1, /* an argument */
  DMI_ERROR_SYSTEM = -2,  /* the operating system refused */
  DMI_ERROR_CLOSED = -3,  /* the ring is closed, unknown, or belongs to the parent process */
  DMI_ERROR_TIMEOUT = -4, /* complete mode waited for the engine to its bound */
};

/* Sizes in bytes are rounded up to pages, capacities to powers of two. */
struct dmi_ring_options {
  uint32_t mode; /* dmi_mode */
  uint32_t lanes;
  uint32_t record_capacity; /* per lane */
  uint32_t command_capacity;
  uint32_t site_capacity;
  int32_t device; /* CUDA device that holds the payload and runs the model; -1: the CPU */
  uint64_t payload_bytes;
  uint64_t table_bytes; /* per lane */
  uint64_t staging_bytes;
  uint64_t spill_bytes;   /* in best-effort mode an eighth of payload_bytes at most */
  uint64_t wait_bound_ns; /* complete mode: longest single wait for the engine */
};

/* A tensor as the op is given it. Borrowed for the length of the call. */
struct dmi_tensor {
  const void* data;
  const int64_t* size;   /* ndim of them */
  const int64_t* stride; /* in elements */
  uint32_t site;
  uint8_t dtype; /* dmi_dtype; DMI_DTYPE_NONE for one that cannot be captured */
  uint8_t ndim;
  int16_t device; /* as the ring's: others are booked as a mismatch */
};

/* What the shared counters do not say. */
struct dmi_gauges {
  uint64_t payload_used; /* bytes reserved and not yet released by the engine */
  uint64_t spill_used;
  uint64_t outside;      /* tensors offered where no step was open, not yet in a lane's counters */
  uint64_t bad_commands; /* engine's commands that the pump refused */
  uint64_t gap_steps;    /* steps that found no room even for a gated OPEN, not yet published as a GAP */
  uint64_t gap_rows;
};

DMI_API const char* dmi_last_error(void);

/* Returns the new ring's handle. Its pump thread is running. */
DMI_API int64_t dmi_ring_create(const struct dmi_ring_options* options);

/* Bytes of the memory that a ring of these options shares with the engine; nothing is made. */
DMI_API int64_t dmi_ring_shared_bytes(const struct dmi_ring_options* options);

/* Whether this build has CUDA. */
DMI_API int32_t dmi_has_cuda(void);

/* Eight bytes of device memory that stand for a ring with a device; valid as long as the process lives. NULL for others. */
DMI_API void* dmi_ring_token(int64_t ring);
/* The ring of a token; 0 if it is closed, -1 for what never was a token. */
DMI_API int64_t dmi_ring_of_token(const void* token);
/* Device memory in use by the ring, in bytes; 0 on the CPU. */
DMI_API int64_t dmi_ring_device_bytes(int64_t ring);

/* memfd, eventfd that the producer writes, eventfd that the engine writes. The ring keeps them; duplicate to keep longer. */
DMI_API int32_t dmi_ring_fds(int64_t ring, int32_t fds[3]);
DMI_API int32_t dmi_ring_producer(int64_t ring, uint8_t producer[16]);

/* Publishes a site and returns its id. `site.id` is ignored. */
DMI_API int64_t dmi_ring_add_site(int64_t ring, const struct dmi_site* site);

/* Whether an engine has the ring. Without one nobody is woken. */
DMI_API int32_t dmi_ring_set_attached(int64_t ring, int32_t attached);

/* Which of the groups that the engine named `groups` these requests are in: a bit of `members` each, group 1 first. From the next step on.
 * What was said of other groups is forgotten. `members` NULL: the requests have no rows any more, and are forgotten. */
DMI_API int32_t dmi_ring_set_groups(int64_t ring, uint64_t groups, const uint64_t* requests, const uint64_t* members, uint32_t count);

/* One dmi_counters a lane, `lanes` at most; returns how many. */
DMI_API int32_t dmi_ring_counters(int64_t ring, struct dmi_counters* counters, uint32_t lanes, struct dmi_gauges* gauges);

/* The last step that each lane has closed, gated ones included; ~0 where there is none. Returns the number of lanes. */
DMI_API int32_t dmi_ring_closed_steps(int64_t ring, uint64_t* steps, uint32_t lanes);

/* Waits until the steps that were closed by now are published: with a device, until it has come to their end. DMI_ERROR_TIMEOUT. */
DMI_API int32_t dmi_ring_settle(int64_t ring, uint64_t bound_ns);

/* No step opens from here on. Closes this thread's open step as aborted, publishes what GAPs are pending (waiting for room up to
 * `bound_ns`), then says DMI_STATE_CLOSED. The engine can go on draining: payload stays until dmi_ring_close. */
DMI_API int32_t dmi_ring_finish(int64_t ring, uint64_t bound_ns);

/* dmi_ring_finish without waiting, and frees everything. What the engine has not copied by now is lost(producer_exit). Waits for ops that
 * are inside the ring, ends their waits, and for commands already posted. Closing twice is no error. */
DMI_API int32_t dmi_ring_close(int64_t ring);

/* Opens a step on the calling thread. A step that the thread left open is closed as aborted first. `width` is dmi_table's.
 * Returns 1: open; 0: gated (booked as dropped); or an error, after which no step is open. In complete mode shortage, and
 * what a step gave up since the last boundary, is DMI_ERROR_TIMEOUT.
 * A ring with a device: the step opens when `stream` (a cudaStream_t) gets there; so do captures and the close. Steps of one ring
 * follow each other on the device, on whatever streams. Not while the stream records a graph: DMI_ERROR_INVALID. */
DMI_API int32_t dmi_step_open(int64_t ring, uint64_t step, const struct dmi_span* spans, uint32_t count, const uint32_t width[DMI_SPACES],
                              uint32_t keys, uint32_t table_flags, void* stream);

/* Steps that follow each other, with a token a row: `spans` as of the last one. */
struct dmi_series {
  int64_t ring;
  struct dmi_span* spans;
  uint32_t count;
  uint32_t width[DMI_SPACES];
  uint32_t table_flags;
};

/* Opens the next one, as dmi_step_open does: moves the spans on by a token, which is a decoded one's. They move, whatever this returns. */
DMI_API int32_t dmi_step_next(const struct dmi_series* series, uint64_t step, uint32_t keys, void* stream);

/* What all spans of a request have that a serving engine runs, and the position of its next row. */
struct dmi_sequence {
  uint64_t request;
  uint32_t prompt;
  uint32_t next;
  uint16_t attempt;
  uint8_t flags;
  uint8_t reserved[5];
};

/* A step of some of them: their rows lie one behind another in the one ROW dimension. */
struct dmi_pack {
  struct dmi_sequence* sequences;
  const uint32_t* slots;     /* whose rows, in their order: places among the sequences */
  const uint32_t* counts;    /* tokens of each, */
  const uint32_t* positions; /* and the position of its first */
  struct dmi_span* spans;    /* room for two of each */
};

/* Makes the spans of a step of `count` requests: the tokens of each, then of each the row whose logits are computed, its last. Moves `next`
 * on, and returns 1. 0, and nothing is changed, where the rows of one do not begin at its `next`: some were computed before, or come
 * from a prefix cache. Reads and writes what `pack` points at and nothing else; slots are taken to be among the sequences. Any thread. */
DMI_API int32_t dmi_pack_rows(const struct dmi_pack* pack, uint32_t count);

/* Closes that step; does nothing if the thread has not got it open (any more). DMI_ERROR_TIMEOUT if a capture of the step gave up. */
DMI_API int32_t dmi_step_close(int64_t ring, uint64_t step, int32_t aborted, void* stream);

/* Calls work(first, last, context) for ranges that make up [begin, end), of `grain` at least, on several threads, and returns when all are
 * done. */
typedef void (*dmi_share)(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t first, int64_t last, void* context),
                          void* context);

/* Lends dmi_capture the threads among which it shares the copying of large tensors on the CPU; until then it copies alone. */
DMI_API void dmi_share_copies(dmi_share share);

/* Captures a group. When it returns, every tensor may be changed; with a device, by what follows on `stream`. While the stream records
 * a graph the capture becomes part of it, and runs in whichever step is open when the graph is replayed. `beside`: nothing changes the
 * tensors before the next call for this ring, which may be one of no tensors; a recording that may branch captures them on a branch. */
DMI_API void dmi_capture(int64_t ring, const struct dmi_tensor* tensors, uint32_t count, int32_t beside, void* stream);

/* Whether what `stream` records from here on may have branches. Whoever allows it takes it back before the recording ends, which joins
 * what is still apart: a recording cannot end with a branch. Does nothing without a device. */
DMI_API int32_t dmi_ring_branch(int64_t ring, int32_t may, void* stream);

#ifdef __cplusplus
}
#endif
#endif
