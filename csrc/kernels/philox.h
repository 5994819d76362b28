// Random words by counting: Philox 4x32-10 (Salmon, Moraes, Dror & Shaw, SC 2011). Any word of any stream is
// computed on its own.
#pragma once

#include "kernels/types.h"

namespace convviz {

struct PhiloxBlock {
  uint32_t word[4];
};

// Ten rounds of the counter under the key; a block is its counter's words, from the lowest.
CONVVIZ_HD PhiloxBlock philox_block(PhiloxBlock counter, uint64_t seed) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  uint32_t (&x)[4] = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x[0], b = uint64_t{0xCD9E8D57} * x[2];
    const uint32_t first = static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0];
    const uint32_t third = static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1];
    x[0] = first;
    x[1] = static_cast<uint32_t>(b);
    x[2] = third;
    x[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// Item i: one block of a stream. Its counter is the block's number, and above that the stream's.
struct Philox {
  const int64_t* streams;  // [count]
  int64_t* out;            // [count, words], each below 2^32
  int64_t words;
  Divider blocks;        // a stream's, the last one cut off
  uint64_t seed, first;  // the number of a stream's first block

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t block = blocks.split(n), begin = 4 * block;
    const uint64_t low = first + static_cast<uint64_t>(block), high = static_cast<uint64_t>(streams[n]);
    const PhiloxBlock counter = {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                                  static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
    const PhiloxBlock random = philox_block(counter, seed);
    int64_t* to = out + n * words + begin;
    CONVVIZ_LANES
    for (int l = 0; l < 4; ++l) {
      if (begin + l < words) to[l] = static_cast<int64_t>(random.word[l]);
    }
  }
};

// Items, blocks of the streams.
void philox_cpu(const Philox& args, int64_t begin, int64_t end);

// Enqueues on the CUDA stream and returns CUDA's error code.
int philox_cuda(const Philox& args, int64_t items, void* stream);

}  // namespace convviz
