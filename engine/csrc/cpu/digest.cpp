// BLAKE2b (RFC 7693, digests of 32 bytes, no key) of many messages of one length: a lane of every vector is a message.
#include "digest.h"

#include <algorithm>
#include <cstring>

namespace lorax::LORAX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMessages = 8;
#elif defined(__AVX2__)
constexpr int kMessages = 4;
#else
constexpr int kMessages = 2;
#endif
typedef uint64_t Words __attribute__((vector_size(8 * kMessages)));

constexpr int64_t kBlock = 128;
constexpr int kDigest = 32;
constexpr uint64_t kIv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                             0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                             0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
constexpr uint8_t kSigma[12][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3}};

template <class V>
inline __attribute__((always_inline)) V rotated(V x, int right) {
  return (x >> right) | (x << (64 - right));
}

template <class V>
inline __attribute__((always_inline)) void mix(V* v, int a, int b, int c, int d, V x, V y) {
  v[a] += v[b] + x;
  v[d] = rotated(v[d] ^ v[a], 32);
  v[c] += v[d];
  v[b] = rotated(v[b] ^ v[c], 24);
  v[a] += v[b] + y;
  v[d] = rotated(v[d] ^ v[a], 16);
  v[c] += v[d];
  v[b] = rotated(v[b] ^ v[c], 63);
}

template <class V>
inline __attribute__((always_inline)) void compress(V* h, const V* m, uint64_t count, bool last) {
  V v[16];
  for (int i = 0; i < 8; ++i) {
    v[i] = h[i];
    v[i + 8] = V{} + kIv[i];
  }
  v[12] ^= V{} + count;
  if (last) v[14] = ~v[14];
#pragma GCC unroll 12
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = kSigma[round];
    mix(v, 0, 4, 8, 12, m[s[0]], m[s[1]]);
    mix(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
    mix(v, 2, 6, 10, 14, m[s[4]], m[s[5]]);
    mix(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
    mix(v, 0, 5, 10, 15, m[s[8]], m[s[9]]);
    mix(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
    mix(v, 2, 7, 8, 13, m[s[12]], m[s[13]]);
    mix(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
  }
  for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[i + 8];
}

inline uint64_t word(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, 8);
  return value;
}

// Word `i` of every message's block, `apart` bytes from message to message.
inline __attribute__((always_inline)) void gather(const uint8_t* at, int64_t, uint64_t* m) {
  std::memcpy(m, at, kBlock);
}
inline __attribute__((always_inline)) void gather(const uint8_t* at, int64_t apart, Words* m) {
  for (int i = 0; i < 16; ++i) {
    for (int lane = 0; lane < kMessages; ++lane) m[i][lane] = word(at + lane * apart + 8 * i);
  }
}

inline uint64_t lane_of(uint64_t value, int) { return value; }
inline uint64_t lane_of(const Words& value, int lane) { return value[lane]; }

// Digests of `lanes` messages of `bytes` bytes each; more than one only in whole blocks.
template <class V>
void hash(const uint8_t* data, int64_t bytes, int lanes, uint8_t* out) {
  V h[8], m[16];
  for (int i = 0; i < 8; ++i) h[i] = V{} + kIv[i];
  h[0] ^= V{} + (0x01010000 ^ uint64_t(kDigest));
  for (int64_t done = 0; done == 0 || done < bytes; done += kBlock) {
    const int64_t count = std::min(bytes - done, kBlock);
    if (count == kBlock) {
      gather(data + done, bytes, m);
    } else {
      uint8_t rest[kBlock] = {};
      std::memcpy(rest, data + done, size_t(count));
      gather(rest, 0, m);
    }
    compress(h, m, uint64_t(done + count), done + count == bytes);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    for (int i = 0; i < kDigest / 8; ++i) {
      const uint64_t value = lane_of(h[i], lane);
      std::memcpy(out + lane * kDigest + 8 * i, &value, 8);
    }
  }
}

}  // namespace

void leaf_digests(const LeafDigestsArgs& args) {
  const int64_t whole = args.bytes / args.leaf, together = whole / kMessages * kMessages;
  for (int64_t i = 0; i < together; i += kMessages)
    hash<Words>(args.data + i * args.leaf, args.leaf, kMessages, args.out + i * kDigest);
  for (int64_t i = together; i * args.leaf < args.bytes; ++i) {
    const int64_t bytes = std::min(args.leaf, args.bytes - i * args.leaf);
    hash<uint64_t>(args.data + i * args.leaf, bytes, 1, args.out + i * kDigest);
  }
}

}  // namespace lorax::LORAX_ISA
