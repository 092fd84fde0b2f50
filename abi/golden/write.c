/* Writes every structure of ring.h, filled by field name, to the directory given: the dumps that C, Go and Python must
 * agree on. expected.json says the same values independently of any layout. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi/golden/offsets.h"
#include "abi/ring.h"

static const char* directory;

static void dump(const char* name, const void* data, size_t bytes) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s.bin", directory, name);
  FILE* file = fopen(path, "wb");
  if (file == NULL || fwrite(data, 1, bytes, file) != bytes || fclose(file) != 0) {
    fprintf(stderr, "write %s: %s\n", path, strerror(errno));
    exit(1);
  }
}

static void header(void) {
  struct dmi_header h = {.magic = DMI_MAGIC, .version = DMI_ABI_VERSION, .mode = DMI_MODE_COMPLETE, .total_bytes = 0x1122334455667788,
                         .created_unix_ns = 1764000000123456789, .device = DMI_DEVICE_CUDA, .lanes = 3, .record_capacity = 16384,
                         .command_capacity = 4096, .site_capacity = 1000, .payload_bytes = 268435456, .table_bytes = 1048576,
                         .staging_bytes = 134217728, .spill_bytes = 67108864, .control_offset = 4096, .sites_offset = 12288,
                         .gates_offset = 268288, .records_offset = 276480, .tables_offset = 6567936, .commands_offset = 9713664,
                         .staging_offset = 9844736, .spill_offset = 144062464};
  for (int i = 0; i < 16; ++i) h.producer[i] = (uint8_t)(0xa0 + i);
  dump("header", &h, sizeof h);
}

static void control(void) {
  static struct dmi_control c;
  c.state.value = DMI_STATE_CLOSED;
  c.sites_count.value = 101;
  c.payload_tail.value = 0x100000000000002;
  c.spill_tail.value = 103;
  c.commands_head.value = 105;
  c.commands_done.value = 104;
  c.engine_waiting.value = 1;
  c.pump_waiting.value = 2;
  c.policy.value = 108;
  c.engine_pid.value = 109;
  for (uint64_t i = 0; i < DMI_MAX_LANES; ++i) {
    struct dmi_lane* lane = &c.lane[i];
    lane->record_tail.value = 1000 * (i + 1);
    lane->table_tail.value = 1000 * (i + 1) + 1;
    struct dmi_counters* n = &lane->counters;
    n->steps = 1000 * (i + 1) + 2;
    n->records = 1000 * (i + 1) + 3;
    n->captured_rows = 1000 * (i + 1) + 4;
    n->captured_bytes = 1000 * (i + 1) + 5;
    for (uint64_t r = 0; r < DMI_REASONS; ++r) n->other_rows[r] = 1000 * (i + 1) + 100 + r;
    n->waits = 1000 * (i + 1) + 6;
    n->wait_ns = 1000 * (i + 1) + 7;
    n->op_calls = 1000 * (i + 1) + 8;
    n->op_ns = 1000 * (i + 1) + 9;
    n->outside = 1000 * (i + 1) + 10;
    n->spilled_bytes = 1000 * (i + 1) + 11;
    n->kept_rows = 1000 * (i + 1) + 12;
    n->offered_bytes = 1000 * (i + 1) + 13;
  }
  dump("control", &c, sizeof c);
}

static void site(void) {
  static const char name[] = "blocks.7.attn.hook_pattern";
  struct dmi_site s = {.id = 5, .layer = 7, .space = DMI_SPACE_LOGITS, .ndim = 4,
                       .role = {DMI_ROLE_ROW, DMI_ROLE_INNER, DMI_ROLE_ROW, DMI_ROLE_KEY}, .row_axis = 1, .fill = 1,
                       .flags = DMI_SITE_OPTIONAL | DMI_SITE_EVENT, .name_bytes = sizeof name - 1};
  memcpy(s.name, name, sizeof name - 1);
  dump("site", &s, sizeof s);
  struct dmi_gate g = {.level = DMI_LEVEL_SAMPLED, .top = 61, .stride = 65535, .clause = 1000, .clauses = 24};
  dump("gate", &g, sizeof g);
  struct dmi_clause c = {.seed = 0x8000000000000003, .threshold = 91, .start = 0xfffffffffffffffe, .stop = DMI_OPEN_END, .step = 92, .stride = 93,
                         .level = DMI_LEVEL_INT8, .region = DMI_REGION_PROMPT, .phases = 2, .one = 1, .group = 98, .request = 0x8000000000000005, .groups = 0x8000000000000007};
  dump("clause", &c, sizeof c);
  struct dmi_watch w = {.above = 0x4059000000000000, .below = 0xfff0000000000000, .bias = 0xbff8000000000000, .condition = DMI_CONDITION_PROBE, .statistic = 6,
                        .weight = 94, .elements = 95};
  dump("watch", &w, sizeof w);
  struct dmi_keep k = {.watch = 0x8000000000000001, .keep = 96, .offer = 97};
  dump("keep", &k, sizeof k);
}

static void records(void) {
  struct dmi_record r = {.seq = 0xfedcba9876543210, .step = 12, .payload = 0x123456789abc, .payload_bytes = 4096, .part_offset = 8192,
                         .tensor_bytes = 12288, .site = 65535, .row_first = 17, .rows = 3, .kind = DMI_KIND_CAPTURE,
                         .outcome = DMI_OUTCOME_DROPPED, .reason = DMI_REASON_BUDGET, .level = DMI_LEVEL_STATS,
                         .size = {1, 2, 3, 4, 5, 4000000000u}, .stride = {720, 360, 120, 30, 6, 1},
                         .role = {1, 2, 3, 1, 2, 3}, .dtype = DMI_DTYPE_F8_E8M0, .ndim = 6, .place = DMI_PLACE_SPILL,
                         .flags = DMI_RECORD_GATHERED | DMI_RECORD_KEPT | DMI_RECORD_OFFER, .selection = 65534, .key_base = 77};
  dump("record", &r, sizeof r);
  struct dmi_open o = {.seq = 21, .step = 22, .table = 23, .table_bytes = 24, .opened_unix_ns = 25, .policy = 26, .sites = 27,
                       .kind = DMI_KIND_OPEN, .gated = 1, .rows = {31, 32, 33}};
  dump("open", &o, sizeof o);
  struct dmi_close c = {.seq = 41, .step = 42, .closed_unix_ns = 43, .records = 44, .wait_ns = 45, .op_ns = 46, .kind = DMI_KIND_CLOSE,
                        .aborted = 1};
  dump("close", &c, sizeof c);
  struct dmi_gap g = {.seq = 51, .step = 52, .last_step = 53, .steps = 54, .rows = 55, .kind = DMI_KIND_GAP};
  dump("gap", &g, sizeof g);
}

static void tables_and_commands(void) {
  struct dmi_table t = {.magic = DMI_TABLE_MAGIC, .bytes = 80, .step = 61, .spans = 1, .flags = DMI_TABLE_PACKED, .keys = 62,
                        .width = {63, 64, 65}};
  dump("table", &t, sizeof t);
  struct dmi_span s = {.request = 0x8000000000000001, .space = DMI_SPACE_CACHE, .batch = 71, .first = 72, .count = 73, .position = 74,
                       .key_first = 75, .attempt = 65000, .phase = DMI_PHASE_DECODE, .flags = 76, .prompt = 77};
  dump("span", &s, sizeof s);
  struct dmi_run r = {.first = 85, .count = 86, .stride = 87, .selection = 60000, .space = DMI_SPACE_LOGITS, .level = DMI_LEVEL_STATS};
  dump("run", &r, sizeof r);
  struct dmi_command c = {.payload = 81, .bytes = 82, .staging = 83, .id = 84};
  dump("command", &c, sizeof c);
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  directory = argv[1];
  header();
  control();
  site();
  records();
  tables_and_commands();
  return 0;
}
