// The threads of the blocks of a cluster as fibres: each runs until it waits for others, then the next one does. A warp goes
// on when all its lanes wait at the same thing, a block when all its threads do. Where nobody can go on, that is an error.
#include "cuda_on_cpu.h"

#include <memory>
#include <string>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace shim {

Thread* current;
dim3 block_dim, grid_dim;
unsigned cluster_blocks;
int64_t cluster_limit = 0;
bool reversed = false;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned LANES = 32;
constexpr int64_t BEYOND = 1024;  // bytes behind the dynamic shared memory that must stay as they are

#ifdef __x86_64__
// Saves the registers that a call must keep, changes stacks, and restores them: some 20 times as fast as swapcontext,
// which asks the system about signals.
extern "C" void fl_switch(void** save, void* load);
asm(R"(
.text
.local fl_switch
.type fl_switch, @function
fl_switch:
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
using Context = void*;
void change(Context& from, Context& to) { fl_switch(&from, to); }
void start(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + STACK_BYTES) / 16 * 16);
  *--top = nullptr;  // entry starts with the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
void change(Context& from, Context& to) { swapcontext(&from, &to); }
void start(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { Ready, Waiting, Done };

struct Fibre {
  Thread thread;
  Context context;
  State state;
  Scope scope;
  const char* what;
};

Context scheduler;
Fibre* running;
const std::function<void()>* body;
std::string failure;

void entry() {
  try {
    (*body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  running->state = State::Done;
  running->thread.running[running->thread.rank]--;
  change(running->context, scheduler);
}

// Whether all of [first, first + count) wait at this scope; then they are let go.
bool release(const char* name, Fibre* first, size_t count, Scope scope) {
  for (size_t i = 0; i < count; i++)
    if (first[i].state != State::Waiting || first[i].scope != scope) return false;
  for (size_t i = 0; i < count; i++)
    if (std::strcmp(first[i].what, first[0].what))
      throw std::runtime_error(std::string(name) + ": threads of one group wait at " + first[0].what + " and at " +
                               first[i].what);
  for (size_t i = 0; i < count; i++) first[i].state = State::Ready;
  return true;
}

void run_cluster(const char* name, std::vector<Fibre>& fibres, size_t threads) {
  const size_t warps = fibres.size() / LANES, blocks = fibres.size() / threads;
  for (;;) {
    bool progress = false;
    for (size_t w = 0; w < warps; w++) {
      Fibre* warp = &fibres[(reversed ? warps - 1 - w : w) * LANES];
      do {
        for (unsigned i = 0; i < LANES; i++) {
          Fibre& fibre = warp[reversed ? LANES - 1 - i : i];
          if (fibre.state != State::Ready) continue;
          progress = true;
          running = &fibre;
          current = &fibre.thread;
          change(scheduler, fibre.context);
          if (!failure.empty()) throw std::runtime_error(std::string(name) + ": " + failure);
        }
      } while (release(name, warp, LANES, Scope::Warp));
    }
    for (size_t b = 0; b < blocks; b++) progress |= release(name, &fibres[b * threads], threads, Scope::Block);
    progress |= release(name, fibres.data(), fibres.size(), Scope::Cluster);
    if (progress) continue;
    size_t done = 0, last = 0;
    for (size_t i = 0; i < fibres.size(); i++) {
      if (fibres[i].state == State::Done) done++;
      else last = i;
    }
    if (done == fibres.size()) return;
    throw std::runtime_error(std::string(name) + ": not all threads reach a barrier: " + std::to_string(done) + " of " +
                             std::to_string(fibres.size()) + " have ended, thread " +
                             std::to_string(fibres[last].thread.thread_index.x) + " waits at " + fibres[last].what);
  }
}

}  // namespace

void wait(Scope scope, const char* what) {
  running->state = State::Waiting;
  running->scope = scope;
  running->what = what;
  change(running->context, scheduler);
}

std::string launched;  // the last kernel

void run(const char* name, dim3 grid, dim3 block, int64_t shared_bytes, int cluster_size, const std::function<void()>& kernel) {
  launched = name;
  const size_t threads = block.x, size = static_cast<size_t>(cluster_size), all = threads * size;
  if (block.y != 1 || block.z != 1 || threads == 0 || threads > 1024 || threads % LANES || grid.x % size || !grid.x ||
      !grid.y || grid.y > 65535 || grid.z != 1)
    throw std::runtime_error(std::string(name) + ": this launch is not supported");
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < all) stacks.emplace_back(new char[STACK_BYTES]);

  std::vector<std::vector<uint64_t>> memory(size, std::vector<uint64_t>(static_cast<size_t>(shared_bytes + BEYOND) / 8 + 4));
  std::vector<unsigned char*> shared;
  for (auto& part : memory)
    shared.push_back(reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(part.data()) + 15) / 16 * 16));
  std::vector<Fibre> fibres(all);
  std::vector<size_t> threads_running(size);
  std::vector<uint64_t> slots(all / LANES * 2 * LANES);
  body = &kernel;
  block_dim = block, grid_dim = grid, cluster_blocks = static_cast<unsigned>(size);

  const size_t clusters = grid.x / size * grid.y;
  for (size_t c = 0; c < clusters; c++) {
    const size_t cluster = reversed ? clusters - 1 - c : c;
    threads_running.assign(size, threads);
    for (auto& part : memory) std::memset(part.data(), 0xff, part.size() * 8);
    for (size_t i = 0; i < all; i++) {
      const size_t rank = i / threads, per_line = grid.x / size;
      Thread& thread = fibres[i].thread;
      thread.thread_index = dim3(static_cast<unsigned>(i % threads), 0, 0);
      thread.block_index =
          dim3(static_cast<unsigned>(cluster % per_line * size + rank), static_cast<unsigned>(cluster / per_line), 0);
      thread.lane = i % LANES, thread.rank = static_cast<unsigned>(rank), thread.exchanges = 0;
      thread.slots = reinterpret_cast<uint64_t(*)[32]>(&slots[i / LANES * 2 * LANES]);
      thread.shared = shared.data(), thread.running = threads_running.data();
      start(fibres[i].context, stacks[i].get(), entry);
      fibres[i].state = State::Ready;
    }
    failure.clear();
    run_cluster(name, fibres, threads);
    for (const unsigned char* part : shared)
      for (int64_t i = 0; i < BEYOND; i++)
        if (part[shared_bytes + i] != 0xff)
          throw std::runtime_error(std::string(name) + ": shared memory is written beyond its end");
  }
}

}  // namespace shim

extern "C" __attribute__((visibility("default"))) void shim_set(int64_t cluster_limit, int reversed) {
  shim::cluster_limit = cluster_limit;
  shim::reversed = reversed;
}
extern "C" __attribute__((visibility("default"))) const char* shim_launched() { return shim::launched.c_str(); }
