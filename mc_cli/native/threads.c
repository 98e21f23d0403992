/* Work is divided among the threads of the OpenMP library that torch uses, where one is named (mc_use_team): they wait
 * for work already, and a second pool beside them would compete with them for the processor. Without one, it is
 * divided among a pool of our own. The pool's workers look for work for some microseconds before they sleep: within a
 * token, calls follow each other closely. Workers are never ended; after a fork the child starts its own.
 *
 * Each thread has a run of neighbours to do, so that it fetches ahead what is its own, and then helps the others: run
 * r of R has the indices count r / R to count (r + 1) / R - 1, and one atomic counter. Whoever adds 1 to it has the
 * index that it was at, so each index is done once, by whom and in which order is open. Nothing is summed here: the
 * pieces of one call write to different places, and so results are the same for any number of threads. */

#include "threads.h"

#include "mc.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define MOST 256
#define LOOKS 2000 /* at the state before sleeping: about 50 microseconds */

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* held by the caller whose work the pool does */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the two conditions */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static _Atomic uint64_t calls; /* call number, changes when there is something to do */
static _Atomic int active;
static int allowed, workers;
static uint64_t hired_at[MOST];
static pid_t owner;

/* GOMP_parallel, which the OpenMP libraries of GNU, LLVM and Intel export: run(context) on a team of `threads`. */
typedef void (*team_start)(void (*run)(void *), void *context, unsigned threads, unsigned flags);

static _Atomic(team_start) start_team;
static pid_t team_owner;

/* Indices 0 to count - 1 in as many runs as there are threads. */
typedef struct {
    mc_work work;
    void *context;
    int count, runs;
    _Atomic int arrived;
    struct {
        _Atomic int next;
        char apart[60]; /* a line of the cache for each */
    } run[MOST];
} Shared;

static Shared *current; /* the pool's work */

static void share_out(Shared *s, mc_work work, void *context, int count, int threads) {
    s->work = work;
    s->context = context;
    s->count = count;
    s->runs = threads < MOST ? threads : MOST;
    atomic_init(&s->arrived, 0);
    for (int run = 0; run < s->runs; run++) atomic_init(&s->run[run].next, (int)((int64_t)count * run / s->runs));
}

static void take_share(void *shared) {
    Shared *s = shared;
    const int own = atomic_fetch_add(&s->arrived, 1);
    for (int helped = 0; helped < s->runs; helped++) {
        const int run = (own + helped) % s->runs, end = (int)((int64_t)s->count * (run + 1) / s->runs);
        for (int index; (index = atomic_fetch_add(&s->run[run].next, 1)) < end;) s->work(s->context, index);
    }
}

int mc_use_team(void *start) {
    team_owner = getpid();
    atomic_store(&start_team, (team_start)start);
    return 0;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void *serve(void *argument) {
    const int number = (int)(intptr_t)argument;
    uint64_t seen = hired_at[number];
    for (;;) {
        int looks = 0;
        while (atomic_load(&calls) == seen && looks++ < LOOKS) pause_briefly();
        if (atomic_load(&calls) == seen) {
            pthread_mutex_lock(&lock);
            while (atomic_load(&calls) == seen) pthread_cond_wait(&wake, &lock);
            pthread_mutex_unlock(&lock);
        }
        seen = atomic_load(&calls);
        if (number < allowed) take_share(current);
        if (atomic_fetch_sub(&active, 1) == 1) {
            pthread_mutex_lock(&lock);
            pthread_cond_signal(&done);
            pthread_mutex_unlock(&lock);
        }
    }
    return NULL;
}

/* Starts workers until there are `wanted`, or no more can be had. */
static void hire(int wanted) {
    if (owner != getpid()) { /* a fork copies no threads */
        owner = getpid();
        workers = 0;
        atomic_store(&calls, 0);
        pthread_mutex_init(&lock, NULL);
        pthread_cond_init(&wake, NULL);
        pthread_cond_init(&done, NULL);
    }
    while (workers < wanted && workers < MOST) {
        hired_at[workers] = atomic_load(&calls);
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        const int failed = pthread_create(&thread, &attributes, serve, (void *)(intptr_t)workers);
        pthread_attr_destroy(&attributes);
        if (failed) return;
        workers++;
    }
}

void mc_parallel(mc_work work, void *context, int count, int threads) {
    if (threads <= 1 || count <= 1) {
        for (int index = 0; index < count; index++) work(context, index);
        return;
    }
    Shared shared;
    const team_start start = atomic_load(&start_team);
    if (start && team_owner == getpid()) { /* a fork copies no threads, and the library would wait for them */
        share_out(&shared, work, context, count, threads);
        start(take_share, &shared, (unsigned)threads, 0); /* all of them: a team that changes its size is made anew */
        return;
    }
    if (threads > count) threads = count;
    share_out(&shared, work, context, count, threads);
    pthread_mutex_lock(&turn);
    hire(threads - 1);
    current = &shared;
    allowed = threads - 1;
    atomic_store(&active, workers);
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&calls, 1);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    take_share(&shared);
    for (int looks = 0; atomic_load(&active) && looks < LOOKS; looks++) pause_briefly();
    pthread_mutex_lock(&lock);
    while (atomic_load(&active)) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&turn);
}
