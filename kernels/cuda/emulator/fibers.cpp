// Fibers, barriers and the loop over blocks.

#include "fibers.hpp"

#include <sched.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__x86_64__)
// Saves what the calling convention asks a function to preserve, changes stacks, and restores the same there: a few
// nanoseconds, where swapcontext makes a system call for the signal mask.
extern "C" void thermocline_switch_stack(void** save, void* to);
asm(R"(
.text
.hidden thermocline_switch_stack
.globl thermocline_switch_stack
thermocline_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulator {
struct Context {
  void* stack_pointer;
};

static void prepare(Context& context, char* stack_end, void (*entry)()) {
  // Six registers, the entry as the return address, and a word that keeps the stack aligned as after a call.
  void** top = reinterpret_cast<void**>(stack_end) - 8;
  for (int i = 0; i < 6; i++) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  top[7] = nullptr;
  context.stack_pointer = top;
}

static void change(Context& from, Context& to) { thermocline_switch_stack(&from.stack_pointer, to.stack_pointer); }
}  // namespace emulator

#else
#include <ucontext.h>

namespace emulator {
struct Context {
  ucontext_t saved;
};

static void prepare(Context& context, char* stack_end, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack_end - emulator::kStackBytes;
  context.saved.uc_stack.ss_size = emulator::kStackBytes;
  makecontext(&context.saved, entry, 0);
}

static void change(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
}  // namespace emulator
#endif

namespace emulator {

struct Warp {
  // Two buffers: nobody can bring a value for the exchange after the next before all have read this one.
  uint32_t lanes[2][32];
  uint32_t arrived, generation, size;
};

struct Fiber {
  Context context;
  dim3 thread;
  uint32_t number;
  Warp* warp;
  bool done;
};

namespace {

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char* stacks = nullptr;
  size_t n_stacks = 0;
  std::vector<uint4> shared;
  Context host;
  const Body* body = nullptr;
  uint32_t n = 0, live = 0, arrived = 0, generation = 0;
  uint32_t team_arrived[16] = {}, team_generation[16] = {};
  // Hand-overs since something last happened: more than there are fibers, twice, and nothing ever will.
  uint32_t idle = 0;
  bool block_waited = false;

  ~Machine() {
    if (stacks != nullptr) munmap(stacks, n_stacks * kStackBytes);
  }
};
thread_local Machine machine;

void hand_over(Machine& m, Fiber& from, Fiber& to) {
  if (&from == &to) return;
  block.running = &to;
  change(from.context, to.context);
}

[[noreturn]] void give_up() {
  std::fprintf(stderr, "emulator: the threads of a block wait for one another at different barriers\n");
  std::abort();
}

// The next fiber of a ring of `size` fibers from `first` on.
void to_next(Machine& m, uint32_t first, uint32_t size) {
  if (++m.idle > 2 * m.n + 64) give_up();
  Fiber& from = *block.running;
  uint32_t next = from.number;
  do {
    next = next + 1 == first + size ? first : next + 1;
  } while (m.fibers[next].done && next != from.number);
  hand_over(m, from, m.fibers[next]);
}

void release(Machine& m) {
  m.arrived = 0;
  m.generation++;
}

void fiber_entry() {
  Machine& m = machine;
  (*m.body)();
  Fiber& self = *block.running;
  self.done = true;
  m.live--;
  m.idle = 0;
  if (m.live == 0) {
    change(self.context, m.host);
  } else {
    if (m.arrived == m.live) release(m);
    to_next(m, 0, m.n);
  }
  give_up();
}

}  // namespace

thread_local Block block;

dim3 thread_index() { return block.running->thread; }

void block_barrier() {
  Machine& m = machine;
  m.idle = 0;
  if (++m.arrived == m.live) return release(m);
  for (const uint32_t before = m.generation; m.generation == before;) to_next(m, 0, m.n);
}

void team_barrier(uint32_t number, uint32_t size) {
  Machine& m = machine;
  m.idle = 0;
  uint32_t& generation = m.team_generation[number];
  if (++m.team_arrived[number] == size) {
    m.team_arrived[number] = 0;
    generation++;
    return;
  }
  for (const uint32_t before = generation; generation == before;) to_next(m, 0, m.n);
}

const uint32_t* exchange(uint32_t mine) {
  Machine& m = machine;
  Fiber& self = *block.running;
  Warp& warp = *self.warp;
  m.idle = 0;
  const uint32_t before = warp.generation;
  uint32_t* lanes = warp.lanes[before & 1];
  lanes[self.number % 32] = mine;
  if (++warp.arrived == warp.size) {
    warp.arrived = 0;
    warp.generation++;
    return lanes;
  }
  // First within the warp; lanes that are held at a barrier of the block are passed by.
  while (warp.generation == before) to_next(m, self.number / 32 * 32, warp.size);
  return lanes;
}

void yield_to_host() {
  machine.idle = 0;
  sched_yield();
}

void wait_for_previous() { machine.block_waited = true; }

Outcome run_grid(dim3 grid, dim3 threads, uint32_t dynamic_shared_bytes, const Body& body) {
  Machine& m = machine;
  m.n = threads.x * threads.y * threads.z;
  if (m.n == 0 || m.n > 1024 || m.n % 32 != 0) return Outcome::kNoSuchGrid;
  if (m.n > m.n_stacks) {
    if (m.stacks != nullptr) munmap(m.stacks, m.n_stacks * kStackBytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, m.n * kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    m.n_stacks = p == MAP_FAILED ? 0 : m.n;
    m.stacks = p == MAP_FAILED ? nullptr : static_cast<char*>(p);
    if (m.stacks == nullptr) return Outcome::kNoSuchGrid;
  }
  m.fibers.resize(m.n);
  m.warps.assign(m.n / 32, Warp{});
  m.body = &body;
  Outcome outcome = Outcome::kDone;
  block.grid = grid;
  block.block = threads;
  for (uint32_t z = 0; z < grid.z; z++)
    for (uint32_t y = 0; y < grid.y; y++)
      for (uint32_t x = 0; x < grid.x; x++) {
        // All bits set, which no kernel takes for a value: what it reads it must have written.
        m.shared.assign((dynamic_shared_bytes + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u});
        block.shared = reinterpret_cast<unsigned char*>(m.shared.data());
        block.index = {x, y, z};
        m.live = m.n;
        m.arrived = m.idle = 0;
        m.block_waited = false;
        for (uint32_t i = 0; i < m.n; i++) {
          Fiber& fiber = m.fibers[i];
          fiber.thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
          fiber.number = i;
          fiber.warp = &m.warps[i / 32];
          fiber.warp->size = 32;
          fiber.done = false;
          prepare(fiber.context, m.stacks + (i + 1) * kStackBytes, fiber_entry);
        }
        block.running = &m.fibers[0];
        change(m.host, m.fibers[0].context);
        if (!m.block_waited) outcome = Outcome::kDoneWithoutWaiting;
      }
  return outcome;
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 0) return from_bits<float>(sign | to_bits(static_cast<float>(mantissa) * 0x1p-24f));
  if (exponent == 31) return from_bits<float>(sign | 0x7f800000u | mantissa << 13);
  return from_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float f) {
  const uint32_t bits = to_bits(f), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7fff);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  // Below 2^-14 halves are multiples of 2^-24: adding 1/2 to the value rounds it there.
  if (size < 0x38800000) return static_cast<uint16_t>(sign | (to_bits(from_bits<float>(size) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

}  // namespace emulator
