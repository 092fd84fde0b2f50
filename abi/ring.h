/* ring.h: the only definition of the memory that an inference process (the producer) shares with the
 * engine. Go and Python views are generated from this file by abi/generate.py and checked in;
 * `make test` fails when they differ. Only plain structs, enums and integer #defines appear here, so that the
 * generator can stay small.
 *
 *   one memfd per session, sealed against resizing before it is sent
 *   +-----------------+ 0
 *   | dmi_header      |  geometry; written once by the producer before the memfd is sent
 *   +-----------------+ control_offset
 *   | dmi_control     |  cursors and counters, a cache-line pair each, one writer each
 *   +-----------------+ sites_offset
 *   | dmi_site  [n]   |  append-only; published by control.sites_count
 *   +-----------------+ gates_offset
 *   | dmi_gate  [n]   |  one per site; written by the engine, latched by step open; behind them
 *   | dmi_clause[]    |  DMI_MAX_CLAUSES: rows that a gate treats otherwise
 *   | dmi_watch[]     |  DMI_MAX_WATCHES: conditions that rows are held against as they are captured
 *   | dmi_keep  [n]   |  one per site: which rows come in full beyond what its gate says
 *   | float32[]       |  DMI_PROBE_FLOATS: weights of linear probes
 *   +-----------------+ records_offset            lanes x record_capacity x 128 B
 *   | dmi_record[][]  |  one ring per lane; what happened, in order
 *   +-----------------+ tables_offset             lanes x table_bytes
 *   | row tables      |  one byte ring per lane; which request and position each row of a step is, and which level it has
 *   +-----------------+ commands_offset
 *   | dmi_command[]   |  engine -> pump: copy this payload to that staging offset
 *   +-----------------+ staging_offset
 *   | staging         |  pump -> engine: payload bytes; allocated by the engine alone
 *   +-----------------+ spill_offset
 *   | spill           |  op -> engine: payload that is little; in complete mode, what did not fit the payload ring
 *   +-----------------+ total_bytes
 *
 * The payload ring itself is NOT in the mapping: it is device memory (CUDA) or private memory (CPU).
 * Offsets into rings are virtual: they count bytes or slots since creation and never wrap; the place in
 * the ring is `offset % capacity`. A payload range may cross the end of the ring; the pump copies it in two pieces.
 * A spill range never does: what is left goes on at the start, in another record. A device that goes on there with what it has not begun
 * says of the bytes that it skips that they are a part of a row, which nothing continues.
 * Every payload and spill range starts at a multiple of DMI_PAYLOAD_ALIGN, and owns the bytes up to the next multiple: the
 * ranges of all lanes tile the ring without holes, so the tails advance by `payload_bytes` rounded up.
 *
 * Memory order. Every word that both sides touch names its writer and its pairing below. "release" and
 * "acquire" are at system scope where the writer is a GPU (st.release.sys), plain C++/Go atomics otherwise.
 * All integers are little-endian. The engine trusts nothing here: it copies, validates, then uses.
 */
#ifndef DMI_ABI_RING_H
#define DMI_ABI_RING_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define DMI_STATIC_ASSERT static_assert
extern "C" {
#else
#define DMI_STATIC_ASSERT _Static_assert
#endif

#define DMI_MAGIC 0x31474e4952494d44ull /* "DMIRING1" */
#define DMI_TABLE_MAGIC 0x5342544du     /* "MTBS" */
#define DMI_ABI_VERSION 3
#define DMI_MAX_LANES 8
#define DMI_MAX_DIMS 6
#define DMI_MAX_SITES 65536
#define DMI_SITE_NAME_BYTES 192
#define DMI_NO_LAYER 0xffffffffu
#define DMI_SPACES 3
#define DMI_REASONS 16
#define DMI_PAYLOAD_ALIGN 64 /* bytes */
#define DMI_LEVELS 6
#define DMI_MAX_CLAUSES 1024
#define DMI_MAX_WATCHES 64
#define DMI_PROBE_FLOATS 262144 /* of all probes together */
#define DMI_STATS 8 /* figures of a row at level STATS */
#define DMI_MOST_TOP 64 /* greatest elements beside them */
#define DMI_OPEN_END 0x7fffffffffffffffull /* dmi_clause.stop: none */

enum dmi_mode { DMI_MODE_BEST_EFFORT = 0, DMI_MODE_COMPLETE = 1 };
enum dmi_device { DMI_DEVICE_CPU = 0, DMI_DEVICE_CUDA = 1 };
enum dmi_state { DMI_STATE_RUNNING = 1, DMI_STATE_CLOSED = 2 };

/* What a dimension of a captured tensor is. ROW dimensions, flattened in order, give a row's source index. */
enum dmi_role { DMI_ROLE_NONE = 0, DMI_ROLE_ROW = 1, DMI_ROLE_INNER = 2, DMI_ROLE_KEY = 3 };

/* A row space: what one row of a site stands for. LOGITS is the part of TOKENS whose logits the model computed.
 * CACHE indexes the same tokens by their slot in the key-value cache (`first` in a span is a slot). */
enum dmi_space { DMI_SPACE_TOKENS = 0, DMI_SPACE_LOGITS = 1, DMI_SPACE_CACHE = 2 };

enum dmi_phase { DMI_PHASE_PREFILL = 0, DMI_PHASE_DECODE = 1 };

/* What leaves the device of a row. The payload of a row is, by level:
 *   FULL           its elements
 *   FP8, INT8      float32 scale, a byte an element, zeros up to a multiple of 4. Elements are rounded to float32 first; the scale is
 *                  the absmax of the finite ones / 416 or / 126, at least 2^-126. FP8: e4m3 codes of element / scale, but
 *                  0x7e is infinity and 0x7f NaN. INT8: round(element / scale), but 127 is infinity and -128 NaN.
 *   STATS          DMI_STATS float32: mean, rms, min, max, absmax, l2 of the finite elements (NaN of none, l2 0), how many are not
 *                  finite, how many there are. Where the gate has a `top` of K: then the K greatest finite elements, float32, the greatest
 *                  first, and their K indices, uint32. Of equal elements the one of the lower index comes first; elements are compared as
 *                  they are, and rounded afterwards. An index counts the elements that count: of a site with a KEY dimension those of the
 *                  row's own keys, one head after the other. Where fewer are finite, NaN and 0xffffffff fill up. A record's K is what its
 *                  bytes say
 * Of a site with a KEY dimension only the keys that the row's token had count; the codes of others are 0. Complex elements have neither
 * order nor one scale: where FP8, INT8 or STATS is wanted they come FULL. */
enum dmi_level {
  DMI_LEVEL_FULL = 0, /* zero, so that gates nobody has written yet let everything through */
  DMI_LEVEL_FP8 = 1,
  DMI_LEVEL_INT8 = 2,
  DMI_LEVEL_SAMPLED = 3, /* of gates and clauses alone: rows at positions that are multiples of a stride are FULL, the others OFF */
  DMI_LEVEL_STATS = 4,
  DMI_LEVEL_OFF = 5
};

enum dmi_outcome {
  DMI_OUTCOME_NONE = 0,
  DMI_OUTCOME_CAPTURED = 1,
  DMI_OUTCOME_SKIPPED = 2,
  DMI_OUTCOME_CACHED = 3,
  DMI_OUTCOME_NOT_COMPUTED = 4,
  DMI_OUTCOME_REJECTED = 5,
  DMI_OUTCOME_DROPPED = 6,
  DMI_OUTCOME_LOST = 7
};

enum dmi_reason {
  DMI_REASON_NONE = 0,
  DMI_REASON_POLICY = 1,       /* skipped */
  DMI_REASON_PREFIX = 2,       /* cached */
  DMI_REASON_ENGINE = 3,       /* not_computed */
  DMI_REASON_SPECULATION = 4,  /* rejected */
  DMI_REASON_RING_FULL = 5,    /* dropped: payload ring had no room */
  DMI_REASON_RECORDS_FULL = 6, /* dropped: record ring or row-table ring had no room, whole step gated */
  DMI_REASON_TIMEOUT = 7,      /* dropped: complete mode waited to its bound */
  DMI_REASON_MISMATCH = 8,     /* dropped: tensor's shape does not fit the site or the step */
  DMI_REASON_ABORTED = 9,      /* dropped: the forward raised before the site was reached */
  DMI_REASON_PRODUCER_EXIT = 10, /* lost */
  DMI_REASON_ENGINE_EXIT = 11,   /* lost */
  DMI_REASON_NOT_FIRED = 12,     /* lost: the step closed and the site had not been captured */
  DMI_REASON_CORRUPT = 13,       /* lost: the engine refused the record */
  DMI_REASON_IO = 14,            /* lost: the store could not be written */
  DMI_REASON_BUDGET = 15         /* dropped: an engine memory or disk budget */
};

/* Names follow safetensors where it has one. */
enum dmi_dtype {
  DMI_DTYPE_NONE = 0,
  DMI_DTYPE_BOOL = 1,
  DMI_DTYPE_U8 = 2,
  DMI_DTYPE_I8 = 3,
  DMI_DTYPE_U16 = 4,
  DMI_DTYPE_I16 = 5,
  DMI_DTYPE_U32 = 6,
  DMI_DTYPE_I32 = 7,
  DMI_DTYPE_U64 = 8,
  DMI_DTYPE_I64 = 9,
  DMI_DTYPE_F16 = 10,
  DMI_DTYPE_BF16 = 11,
  DMI_DTYPE_F32 = 12,
  DMI_DTYPE_F64 = 13,
  DMI_DTYPE_F8_E4M3 = 14,
  DMI_DTYPE_F8_E5M2 = 15,
  DMI_DTYPE_F8_E4M3FNUZ = 16,
  DMI_DTYPE_F8_E5M2FNUZ = 17,
  DMI_DTYPE_F8_E8M0 = 18,
  DMI_DTYPE_C64 = 19,
  DMI_DTYPE_C128 = 20
};

/* ------------------------------------------------------------------ header: written once, then read-only */
struct dmi_header {
  uint64_t magic;       /* DMI_MAGIC */
  uint32_t version;     /* DMI_ABI_VERSION */
  uint32_t mode;        /* dmi_mode */
  uint64_t total_bytes; /* size of the memfd */
  uint64_t created_unix_ns;
  uint8_t producer[16]; /* random; names this ring for its whole life, across reconnections */
  uint32_t device;      /* dmi_device */
  uint32_t lanes;       /* 1..DMI_MAX_LANES */
  uint32_t record_capacity; /* records per lane, a power of two */
  uint32_t command_capacity; /* a power of two */
  uint32_t site_capacity;
  uint32_t spare;
  uint64_t payload_bytes; /* capacity of the payload ring, outside this mapping; a multiple of 4096 */
  uint64_t table_bytes;   /* per lane, a multiple of 4096 */
  uint64_t staging_bytes; /* a multiple of 4096 */
  uint64_t spill_bytes;   /* a multiple of 4096 */
  uint64_t control_offset; /* all offsets are multiples of 4096 */
  uint64_t sites_offset;
  uint64_t gates_offset;
  uint64_t records_offset;
  uint64_t tables_offset;
  uint64_t commands_offset;
  uint64_t staging_offset;
  uint64_t spill_offset;
};

/* A word alone on its pair of cache lines: adjacent words written by two cores cost 15 ns a store, padded 2.5. */
struct dmi_word {
  uint64_t value;
  uint8_t pad[120];
};

/* Counters of one lane. Writer: the lane's capturing thread (CPU) or stream (CUDA), relaxed; readers take
 * them as statistics, and as exact once the lane's step is closed (they are stored before the CLOSE record's
 * release). Rows are row-outcomes as in dmi_outcome: they repeat, from the producer's side, what the records say. */
struct dmi_counters {
  uint64_t steps;            /* steps opened, gated ones included */
  uint64_t records;          /* records published */
  uint64_t captured_rows;    /* rows in CAPTURED records */
  uint64_t captured_bytes;
  uint64_t other_rows[DMI_REASONS]; /* rows published with another outcome, by dmi_reason */
  uint64_t waits;            /* times that the op waited for the engine (complete mode only) */
  uint64_t wait_ns;
  uint64_t op_calls;
  uint64_t op_ns;            /* host time inside the op, waits included */
  uint64_t outside;          /* tensors offered outside an open step: not captured, not part of the books */
  uint64_t spilled_bytes;
  uint64_t kept_rows;        /* of captured_rows: KEPT */
  uint64_t offered_bytes;    /* not part of captured_bytes */
  uint64_t spare[4];
};

struct dmi_lane {
  struct dmi_word record_tail; /* records consumed. Writer: engine, release, after it has copied the record and the
                                  row table it refers to, and the step manifest holds both; reader: lane, acquire, on shortage only */
  struct dmi_word table_tail;  /* row-table bytes consumed. Writer: engine, release; reader: lane, acquire, on shortage only */
  struct dmi_counters counters;
};

struct dmi_control {
  struct dmi_word state;        /* dmi_state. Writer: producer, release; reader: engine, acquire */
  struct dmi_word sites_count;  /* sites published. Writer: producer, release, after the entries; reader: engine, acquire */
  struct dmi_word payload_tail; /* payload bytes below this are free. Writer: engine, release, after the pump completed every copy
                                   from them; reader: every lane, acquire, on shortage only */
  struct dmi_word spill_tail;   /* likewise for the spill ring, after the engine is done with the bytes */
  struct dmi_word commands_head; /* commands posted. Writer: engine, release, after the entries; reader: pump, acquire */
  struct dmi_word commands_done; /* commands completed, in order. Writer: pump, release, after the bytes; reader: engine, acquire */
  struct dmi_word engine_waiting; /* 1: engine is about to block on its eventfd. Writer: engine, seq_cst, then it looks at the rings once
                                     more; reader: pump and CPU lanes, seq_cst fence after publishing; whoever sees 1 writes the eventfd.
                                     The eventfd is level: a second write costs a syscall, not correctness */
  struct dmi_word pump_waiting;   /* the same in the other direction. Writer: pump; reader: engine */
  struct dmi_word policy;         /* version of the gates. Odd while the engine is writing them. Writer: engine; reader: step open:
                                     acquire, read gates, acquire fence, read again, retry while odd or changed (bounded: keeps the last latch) */
  struct dmi_word engine_pid;     /* informational. Writer: engine. 0 when no engine has mapped the ring */
  struct dmi_word spare[6];
  struct dmi_lane lane[DMI_MAX_LANES];
};

/* ------------------------------------------------------------------ sites
 * Writer: producer, before sites_count's release. Ids are the index in the table and are never reused. */
struct dmi_site {
  uint32_t id;
  uint32_t layer;   /* DMI_NO_LAYER where it has none */
  uint8_t space;    /* dmi_space */
  uint8_t ndim;     /* of the tensor the op is given, 1..DMI_MAX_DIMS; 0: any (a leading ROW axis, the rest INNER) */
  uint8_t role[DMI_MAX_DIMS]; /* dmi_role of each dimension */
  uint8_t row_axis; /* where the row axis stands in what a reader is given: 0, or 1 for [n_heads, query, key] */
  uint8_t fill;     /* value of keys a row did not have: 0 zero, 1 minus infinity */
  uint8_t flags;    /* DMI_SITE_* */
  uint8_t spare;
  uint32_t name_bytes;
  uint8_t name[DMI_SITE_NAME_BYTES]; /* UTF-8, canonical name, not terminated */
  uint8_t pad[40];
};
#define DMI_SITE_OPTIONAL 1 /* may stay silent in a step without that being an error (an expert that no token chose) */
#define DMI_SITE_EVENT 2    /* fires any number of times a step */

/* ------------------------------------------------------------------ gates
 * Writer: engine, under control.policy. Reader: step open. */
struct dmi_gate {
  uint8_t level;    /* dmi_level of rows that no clause takes */
  uint8_t top;      /* of all rows at level STATS, whichever clause gives them: how many of the greatest elements; at most DMI_MOST_TOP */
  uint16_t stride;  /* of SAMPLED; at least 1 */
  uint16_t clause;  /* index of the first of the clauses, which are asked in order: the first that takes a row decides */
  uint16_t clauses; /* how many */
};

enum dmi_region { DMI_REGION_ALL = 0, DMI_REGION_PROMPT = 1, DMI_REGION_GENERATED = 2 };

/* Takes the rows of requests whose hash is below `threshold`, of one alone, or of a group, in `phases`, at positions of a window: start, start + step, ...
 * below stop, counted from where the region begins. Of a request whose spans do not say how long its prompt is, GENERATED and what is counted from the
 * prompt's end take no row, and PROMPT those of phase PREFILL.
 * Groups are what rules by ids and tags mean. The engine names them over the control socket; the producer, which has ids and tags, says of each request
 * which it is in. Until it does so for the very groups that a clause names, its requests are of DMI_GROUP_UNKNOWN and of none else.
 * Writer: engine, with the gates. cuda/src/levels.h says it in code. */
struct dmi_clause {
  uint64_t seed;      /* of the hash: splitmix64 of the request's number */
  uint64_t threshold; /* 0: every request */
  uint64_t start;     /* two's complement; negative, as `stop`: from the prompt's end */
  uint64_t stop;      /* DMI_OPEN_END: none */
  uint32_t step;      /* at least 1 */
  uint16_t stride;    /* of SAMPLED; at least 1 */
  uint8_t level;      /* dmi_level of the rows that it takes */
  uint8_t region;     /* dmi_region */
  uint8_t phases;     /* a bit for each dmi_phase that it takes */
  uint8_t one;        /* 1: of `request` alone */
  uint8_t group;      /* 0: any request; 1 to DMI_MAX_GROUPS: those of this group; DMI_GROUP_UNKNOWN */
  uint8_t spare[5];
  uint64_t request;
  uint64_t groups; /* which groups `group` is one of, by the name that the engine gave them; never 0 where `group` is not */
};
#define DMI_MAX_GROUPS 64
#define DMI_GROUP_UNKNOWN 255 /* requests of which the producer has not said which of the groups they are in */

/* A condition on a row, evaluated by the op itself: what meets it is captured in the step that it happens in, without anything else taking room.
 * NONFINITE: the row has a NaN or an infinity. STATISTIC: a figure of the row is above or below a bound. PROBE: so is the weights' product with the row's
 * elements, plus bias, in double. Doubles are given by their bits; a bound that is not wanted is an infinity. Writer: engine, with the gates; reader: step
 * open. cuda/src/watch.h says it in code. */
enum dmi_condition { DMI_CONDITION_NONE = 0, DMI_CONDITION_NONFINITE = 1, DMI_CONDITION_STATISTIC = 2, DMI_CONDITION_PROBE = 3 };
struct dmi_watch {
  uint64_t above;
  uint64_t below;
  uint64_t bias;
  uint8_t condition; /* dmi_condition */
  uint8_t statistic; /* index into a row's figures at level STATS */
  uint16_t spare;
  uint32_t weight;   /* index of the probe's first weight */
  uint32_t elements; /* of the probe; rows of other lengths do not meet it */
  uint32_t spare1;
};

/* Bits are indices of watches. Writer: engine, with the gates; reader: step open. */
struct dmi_keep {
  uint64_t watch; /* conditions that the site's rows are held against, whatever their level */
  uint64_t keep;  /* if rows of a request have met one of these in the step so far, those of it at this site are KEPT */
  uint64_t offer; /* not 0: rows that the gate does not give in full are offered */
};

/* ------------------------------------------------------------------ records: 128 bytes, one kind each
 * `seq` is the publication word: slot `i % record_capacity` holds record i once seq == i + 1.
 * Writer: the lane, all other fields first, then seq with release. Reader: engine, seq with acquire, then a copy
 * of the rest. The lane writes slot i only after record_tail > i - record_capacity (acquire). */
enum dmi_kind { DMI_KIND_OPEN = 1, DMI_KIND_CAPTURE = 2, DMI_KIND_CLOSE = 3, DMI_KIND_GAP = 4 };
enum dmi_place { DMI_PLACE_NONE = 0, DMI_PLACE_RING = 1, DMI_PLACE_SPILL = 2 };

/* A captured tensor, part of one, or rows that were not captured and why.
 *
 * The payload is the tensor as `size`, `stride` (in elements, of the payload as it lies in the ring) and `role` say.
 * GATHERED: the op has already kept only the step's rows of this space, in row-list order (the order of the
 * spans in the row table): dimension 0 is the one ROW dimension, and the payload is dense.
 * Otherwise the payload is a copy of the whole source and a row's place is its span's (batch, first): with two ROW
 * dimensions those are their indices; with one the index is `batch * table.width[space] + first`.
 *
 * `selection` 0: the row list is the spans' rows in their order, all at one level. Otherwise it is that order rearranged: the rows of the
 * table's runs of this selection and space, as they follow each other there, of one level after the other.
 *
 * `size` and `stride` say what the elements are, of whatever level: FP8, INT8 and STATS rows are GATHERED, and lie in the payload
 * behind each other as dmi_level says. Rows at those levels are never a copy of the whole source.
 *
 * A GATHERED payload holds rows `row_first`, `row_first + 1`, ... of the row list. What does not fit one reservation goes on in
 * further records of the same step and site, each with its own row_first and size[0], each readable alone; rows that
 * found no room at all follow in a DROPPED record.
 *
 * Only a row larger than a reservation comes in parts: consecutive CAPTURE records of the lane with the same step, site and
 * row_first, size[0] == 1, part_offset growing. `rows` is 0 until the part that ends the row. Parts followed by anything but
 * the next part are discarded: their row is settled by a later record. */
struct dmi_record {
  uint64_t seq;
  uint64_t step;
  uint64_t payload;       /* virtual offset in `place` */
  uint64_t payload_bytes; /* bytes of this part */
  uint64_t part_offset;   /* bytes of the tensor delivered by earlier parts; 0 for a tensor in one part */
  uint64_t tensor_bytes;  /* of all parts; == payload_bytes for a tensor in one part */
  uint32_t site;
  uint32_t row_first; /* in row-list order: first row that this record settles */
  uint32_t rows;
  uint8_t kind; /* DMI_KIND_CAPTURE */
  uint8_t outcome;
  uint8_t reason;
  uint8_t level;
  uint32_t size[DMI_MAX_DIMS];   /* of the whole tensor */
  uint32_t stride[DMI_MAX_DIMS];
  uint8_t role[DMI_MAX_DIMS];
  uint8_t dtype;
  uint8_t ndim;
  uint8_t place; /* dmi_place; NONE when outcome is not CAPTURED */
  uint8_t flags; /* DMI_RECORD_* */
  uint16_t selection;
  uint32_t key_base; /* cache slot of the payload's first key, where it has a KEY dimension: keys of a sliding
                        window start later than slot 0 */
};
#define DMI_RECORD_GATHERED 1
#define DMI_RECORD_KEPT 2  /* rows that are in full because a condition was met, whatever level the gate gives them */
#define DMI_RECORD_OFFER 4 /* in full, in the payload ring, and copied only if the engine wants them: they settle nothing. What the gate gives of the same rows
                              follows. GATHERED, in one part. An offer never waits for room, and is not made where there is none */

/* A step begins. `rows` per space are what the row table's spans sum to. */
struct dmi_open {
  uint64_t seq;
  uint64_t step;
  uint64_t table;       /* virtual offset in the lane's row-table ring; a table never wraps: it is padded to the start */
  uint64_t table_bytes; /* 0: gated step, its table did not fit */
  uint64_t opened_unix_ns;
  uint64_t policy;      /* gates version latched */
  uint32_t sites;       /* sites that exist at open: every one owes the step's rows */
  uint32_t spare0[2];
  uint8_t kind; /* DMI_KIND_OPEN; at the same offset as in dmi_record */
  uint8_t gated; /* 1: record ring was short: only the CLOSE follows; all rows of all sites are dropped(records_full) */
  uint8_t spare1[2];
  uint32_t rows[DMI_SPACES]; /* by dmi_space */
  uint8_t spare2[52];
};

struct dmi_close {
  uint64_t seq;
  uint64_t step;
  uint64_t closed_unix_ns;
  uint64_t records; /* CAPTURE records published in this step */
  uint64_t wait_ns; /* spent waiting for the engine in this step */
  uint64_t op_ns;
  uint32_t spare0[3];
  uint8_t kind; /* DMI_KIND_CLOSE */
  uint8_t aborted; /* 1: the forward raised; sites that did not fire are dropped(aborted), not an error */
  uint8_t spare1[2];
  uint8_t spare2[64];
};

/* Steps for which not even a gated OPEN had room, summed. Published when room returns, before the next OPEN. */
struct dmi_gap {
  uint64_t seq;
  uint64_t step;      /* first */
  uint64_t last_step;
  uint64_t steps;
  uint64_t rows;      /* rows of the token space x sites, summed: dropped(records_full), request unknown */
  uint64_t spare0;
  uint32_t spare1[3];
  uint8_t kind; /* DMI_KIND_GAP */
  uint8_t spare2[3];
  uint8_t spare3[64];
};

/* ------------------------------------------------------------------ row tables
 * At OPEN's `table`: a dmi_table, its spans, and runs up to `bytes`. Writer: the adapter's thread, before OPEN's release. A span is a run
 * of rows of one request, consecutive in the source and in the request's positions, so the same form describes
 * padded batches (a span per batch row, pads left out) and packed ones (a span per chunk of a prompt or decoded token). */
struct dmi_table {
  uint32_t magic; /* DMI_TABLE_MAGIC */
  uint32_t bytes; /* of this header, the spans and the runs */
  uint64_t step;
  uint32_t spans;
  uint32_t flags; /* DMI_TABLE_* */
  uint32_t keys;  /* slots of the key-value cache in use after this step, pads included; 0 where unknown */
  uint32_t width[DMI_SPACES]; /* length of the last ROW dimension of an unpacked source, by dmi_space */
};
#define DMI_TABLE_PACKED 1 /* one row dimension holds many requests: batch is 0 everywhere */

struct dmi_span {
  uint64_t request; /* the session's number for it; told on the control socket */
  uint32_t space;   /* dmi_space */
  uint32_t batch;   /* index along the first of two ROW dimensions; 0 when packed */
  uint32_t first;   /* index along the last ROW dimension (a cache slot in DMI_SPACE_CACHE) */
  uint32_t count;
  uint32_t position; /* of the first row, in the request, counted without pads */
  uint32_t key_first; /* cache slot of the request's position 0 */
  uint16_t attempt;   /* grows when an engine computes a position again (preemption) */
  uint8_t phase;      /* dmi_phase */
  uint8_t flags;      /* DMI_SPAN_* */
  uint32_t prompt;    /* tokens of the request's prompt; 0: not known */
};
#define DMI_SPAN_CACHED 1 /* tokens whose keys and values the model took from another request's: no tensor of the step has them. `first` is 0, and they
                             are in no row list: the engine books them as cached(prefix) */
#define DMI_SPAN_CHOSEN 4 /* its request asks for some of its rows alone, or for none: the engine was told which, and where it was not it keeps none */
#define DMI_SPAN_DRAFT 2  /* tokens that were guessed: booked when the next step of the lane opens, which says which of them were rejected */
#define DMI_SPAN_REJECTED 8 /* DRAFT tokens of the lane's step before, with its attempt, that the model did not agree with: in no row list, `first` is 0.
                               The engine books their rows of every space as rejected(speculation) */
#define DMI_SPAN_NO_ROWS 9  /* CACHED | REJECTED */

/* Rows first, first + stride, ... (count of them) of the row list of a space, at one level. The runs of a selection and space follow each other by level,
 * FULL first and OFF last, and have every row of the space once. Selections are numbered from 1. */
struct dmi_run {
  uint32_t first;
  uint32_t count;
  uint32_t stride; /* at least 1 */
  uint16_t selection;
  uint8_t space; /* dmi_space */
  uint8_t level; /* dmi_level */
};

/* ------------------------------------------------------------------ commands: engine -> pump
 * Slot `i % command_capacity`. Writer: engine, before commands_head's release. Executed in order. */
struct dmi_command {
  uint64_t payload; /* virtual offset in the payload ring */
  uint64_t bytes;
  uint64_t staging; /* offset in the staging region; the range does not wrap */
  uint64_t id;      /* == its index; lets a torn or replayed slot be noticed */
};

/* ------------------------------------------------------------------ sizes and offsets */
DMI_STATIC_ASSERT(sizeof(struct dmi_word) == 128, "word");
DMI_STATIC_ASSERT(sizeof(struct dmi_header) == 168, "header");
DMI_STATIC_ASSERT(offsetof(struct dmi_header, payload_bytes) == 72, "header.payload_bytes");
DMI_STATIC_ASSERT(offsetof(struct dmi_header, spill_offset) == 160, "header.spill_offset");
DMI_STATIC_ASSERT(sizeof(struct dmi_counters) == 256, "counters");
DMI_STATIC_ASSERT(sizeof(struct dmi_lane) == 512, "lane");
DMI_STATIC_ASSERT(offsetof(struct dmi_control, lane) == 2048, "control.lane");
DMI_STATIC_ASSERT(sizeof(struct dmi_site) == 256, "site");
DMI_STATIC_ASSERT(offsetof(struct dmi_site, name_bytes) == 20, "site.name_bytes");
DMI_STATIC_ASSERT(sizeof(struct dmi_gate) == 8, "gate");
DMI_STATIC_ASSERT(sizeof(struct dmi_clause) == 64, "clause");
DMI_STATIC_ASSERT(sizeof(struct dmi_watch) == 40, "watch");
DMI_STATIC_ASSERT(sizeof(struct dmi_keep) == 24, "keep");
DMI_STATIC_ASSERT(sizeof(struct dmi_run) == 16, "run");
DMI_STATIC_ASSERT(offsetof(struct dmi_record, selection) == 122, "record.selection");
DMI_STATIC_ASSERT(sizeof(struct dmi_record) == 128, "record");
DMI_STATIC_ASSERT(offsetof(struct dmi_record, kind) == 60, "record.kind");
DMI_STATIC_ASSERT(offsetof(struct dmi_record, size) == 64, "record.size");
DMI_STATIC_ASSERT(offsetof(struct dmi_record, role) == 112, "record.role");
DMI_STATIC_ASSERT(offsetof(struct dmi_record, key_base) == 124, "record.key_base");
DMI_STATIC_ASSERT(sizeof(struct dmi_open) == 128, "open");
DMI_STATIC_ASSERT(offsetof(struct dmi_open, kind) == 60, "open.kind");
DMI_STATIC_ASSERT(sizeof(struct dmi_close) == 128, "close");
DMI_STATIC_ASSERT(offsetof(struct dmi_close, kind) == 60, "close.kind");
DMI_STATIC_ASSERT(sizeof(struct dmi_gap) == 128, "gap");
DMI_STATIC_ASSERT(offsetof(struct dmi_gap, kind) == 60, "gap.kind");
DMI_STATIC_ASSERT(sizeof(struct dmi_table) == 40, "table");
DMI_STATIC_ASSERT(sizeof(struct dmi_span) == 40, "span");
DMI_STATIC_ASSERT(sizeof(struct dmi_command) == 32, "command");

#ifdef __cplusplus
}
#endif
#endif
