// CUDA kernels executed on the CPU, for correctness tests without a GPU: one fiber per CUDA thread, one block at a time.
// Warps run greedily in random order (seed), which exposes missing barriers that fair round-robin scheduling hides.
// Checked: launch limits, divergent or unreached barriers, deadlock; build with -fsanitize=address,undefined for memory errors.
// Not emulated: warp masks (all live lanes take part), mma, cp.async, TMA, races between blocks.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static  // one block at a time: static storage is per block
#define __constant__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = void*;

namespace emu {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  int barrier_id = 0;
};

struct Machine {
  dim3 grid, block, block_index, thread_index;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int current = 0, threads = 0;
  char* dynamic_shared = nullptr;
  uint64_t lane_value[32][kWarp];
  std::function<void()> body;
  uint64_t switches = 0;
  unsigned seed = 1;  // 0: warps in order, lanes in order
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void resume(int thread) {
  Machine& m = machine();
  m.current = thread;
  const unsigned t = (unsigned)thread;
  m.thread_index = dim3(t % m.block.x, t / m.block.x % m.block.y, t / (m.block.x * m.block.y));
  swapcontext(&m.scheduler, &m.fibers[thread].context);
}

inline void pause(State why, int barrier_id = 0) {
  Machine& m = machine();
  Fiber& me = m.fibers[m.current];
  me.state = why, me.barrier_id = barrier_id;
  m.switches++;
  swapcontext(&me.context, &m.scheduler);
}

inline void fiber_main() {
  machine().body();
  pause(State::kDone);
}

// Run one warp until every live lane waits at a block barrier or has exited. True if anything moved.
inline bool run_warp(int begin, int end, int first_lane) {
  Machine& m = machine();
  bool progressed = false;
  for (;;) {
    bool ran = false;
    for (int k = 0; k < kWarp; k++) {
      const int i = begin + (k + first_lane) % kWarp;
      if (i < end && m.fibers[i].state == State::kReady) resume(i), ran = progressed = true;
    }
    int waiting = 0, alive = 0, id = -1;
    bool same = true;
    for (int i = begin; i < end; i++) {
      alive += m.fibers[i].state != State::kDone;
      if (m.fibers[i].state != State::kAtWarpBarrier) continue;
      waiting++;
      if (id < 0) id = m.fibers[i].barrier_id;
      same &= id == m.fibers[i].barrier_id;
    }
    if (waiting && waiting == alive && same) {
      for (int i = begin; i < end; i++)
        if (m.fibers[i].state == State::kAtWarpBarrier) m.fibers[i].state = State::kReady;
      progressed = true;
    } else if (!ran) {
      return progressed;
    }
  }
}

inline void run_block(unsigned seed) {
  Machine& m = machine();
  std::mt19937 random(seed);
  const int n = m.threads, warps = (n + kWarp - 1) / kWarp;
  std::vector<int> order(warps);
  for (int w = 0; w < warps; w++) order[w] = w;
  for (Fiber& f : m.fibers) {
    f.state = State::kReady;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = &m.scheduler;
    makecontext(&f.context, fiber_main, 0);
  }
  for (;;) {
    bool progressed = false;
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (int w : order)
      progressed |= run_warp(w * kWarp, std::min(n, w * kWarp + kWarp), seed ? (int)(random() % kWarp) : 0);
    int at_barrier = 0, done = 0;
    for (Fiber& f : m.fibers) at_barrier += f.state == State::kAtBlockBarrier, done += f.state == State::kDone;
    if (done == n) return;
    if (at_barrier && at_barrier + done == n) {
      if (done) throw std::runtime_error("emu: __syncthreads() not reached by all threads (some exited)");
      for (Fiber& f : m.fibers) f.state = State::kReady;
      progressed = true;
    }
    if (!progressed) throw std::runtime_error("emu: deadlock: divergent __syncthreads() or warp operation");
  }
}

template <class Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Body&& body) {
  Machine& m = machine();
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535)
    throw std::runtime_error("emu: invalid launch configuration");
  if (shared_bytes > 227 * 1024) throw std::runtime_error("emu: too much dynamic shared memory");
  m.grid = grid, m.block = block, m.threads = (int)threads, m.body = body;
  m.fibers.resize((size_t)m.threads);
  for (Fiber& f : m.fibers)
    if (!f.stack) f.stack.reset(new char[kStackBytes]);
  std::unique_ptr<char[]> shared(new char[shared_bytes + 16]);  // exact size, so ASan sees overruns
  m.dynamic_shared = (char*)(((uintptr_t)shared.get() + 15) & ~(uintptr_t)15);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        m.block_index = dim3(x, y, z);
        memset(m.dynamic_shared, 0xFF, shared_bytes);  // reads as NaN
        run_block(m.seed ? m.seed + x * 7919u + y * 104729u + z * 1299709u : 0);
      }
}

// All lanes publish, meet, read the source lane, meet again.
template <class T>
T exchange(T value, int source) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "emu: unsupported shuffle type");
  Machine& m = machine();
  const int warp = m.current / kWarp, lane = m.current % kWarp;
  memcpy(&m.lane_value[warp][lane], &value, sizeof(T));
  pause(State::kAtWarpBarrier, 1);
  T result = value;
  if (source >= 0 && source < kWarp && warp * kWarp + source < m.threads)
    memcpy(&result, &m.lane_value[warp][source], sizeof(T));
  pause(State::kAtWarpBarrier, 2);
  return result;
}

inline int lane() { return machine().current % kWarp; }

}  // namespace emu

#define threadIdx (emu::machine().thread_index)
#define blockIdx (emu::machine().block_index)
#define blockDim (emu::machine().block)
#define gridDim (emu::machine().grid)
#define warpSize 32

inline void __syncthreads() { emu::pause(emu::State::kAtBlockBarrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emu::pause(emu::State::kAtWarpBarrier, 3); }
template <class T>
T __shfl_sync(unsigned, T v, int source, int width = 32) {
  return emu::exchange(v, emu::lane() / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask, int = 32) {
  return emu::exchange(v, emu::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T v, unsigned delta, int width = 32) {
  const int l = emu::lane(), s = l + (int)delta;
  return emu::exchange(v, s / width == l / width ? s : l);
}
template <class T>
T __shfl_up_sync(unsigned, T v, unsigned delta, int width = 32) {
  const int l = emu::lane(), s = l - (int)delta;
  return emu::exchange(v, s >= 0 && s / width == l / width ? s : l);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned result = 0;
  for (int i = 0; i < 32; i++) result |= (unsigned)(emu::exchange(predicate != 0, i)) << i;
  return result;
}
template <class T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

#define GK_LAUNCH(kernel, grid, block, stream, ...) \
  emu::launch(grid, block, 0, [&] {                 \
    (void)(stream);                                 \
    kernel(__VA_ARGS__);                            \
  })
