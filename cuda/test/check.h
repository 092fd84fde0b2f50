// The least that a test needs.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (0)

#define CHECK_EQ(a, b)                                                                                              \
  do {                                                                                                              \
    const auto left = (a);                                                                                          \
    const auto right = (b);                                                                                         \
    if (!(left == right)) {                                                                                         \
      std::fprintf(stderr, "%s:%d: %s is %s, %s is %s\n", __FILE__, __LINE__, #a, std::to_string(left).c_str(), #b, \
                   std::to_string(right).c_str());                                                                  \
      std::abort();                                                                                                 \
    }                                                                                                               \
  } while (0)

// DMI_TEST_SEED repeats a run.
inline uint64_t test_seed() {
  static const uint64_t seed = [] {
    const char* given = std::getenv("DMI_TEST_SEED");
    const uint64_t value = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
    std::printf("DMI_TEST_SEED=%llu\n", static_cast<unsigned long long>(value));
    std::fflush(stdout);
    return value;
  }();
  return seed;
}
