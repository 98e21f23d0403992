/* A pool of threads. Workers look for work for some microseconds before they sleep: within a token, calls follow each
 * other closely. Workers are never ended; after a fork the child starts its own. */

#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define MOST 256
#define LOOKS 2000 /* at the state before sleeping: about 50 microseconds */

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* held by the caller whose work the pool does */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the two conditions */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static _Atomic uint64_t work; /* call number, changes when there is something to do */
static _Atomic int next_index, active;
static mc_task current;
static void *current_context;
static int current_count, allowed, workers;
static uint64_t hired_at[MOST];
static pid_t owner;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void take_part(void) {
    for (int index; (index = atomic_fetch_add(&next_index, 1)) < current_count;) current(current_context, index);
}

static void *serve(void *argument) {
    const int number = (int)(intptr_t)argument;
    uint64_t seen = hired_at[number];
    for (;;) {
        int looks = 0;
        while (atomic_load(&work) == seen && looks++ < LOOKS) pause_briefly();
        if (atomic_load(&work) == seen) {
            pthread_mutex_lock(&lock);
            while (atomic_load(&work) == seen) pthread_cond_wait(&wake, &lock);
            pthread_mutex_unlock(&lock);
        }
        seen = atomic_load(&work);
        if (number < allowed) take_part();
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
        atomic_store(&work, 0);
        pthread_mutex_init(&lock, NULL);
        pthread_cond_init(&wake, NULL);
        pthread_cond_init(&done, NULL);
    }
    while (workers < wanted && workers < MOST) {
        hired_at[workers] = atomic_load(&work);
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

void mc_parallel(mc_task task, void *context, int count, int threads) {
    if (threads > count) threads = count;
    if (threads <= 1) {
        for (int index = 0; index < count; index++) task(context, index);
        return;
    }
    pthread_mutex_lock(&turn);
    hire(threads - 1);
    current = task;
    current_context = context;
    current_count = count;
    allowed = threads - 1;
    atomic_store(&next_index, 0);
    atomic_store(&active, workers);
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&work, 1);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    take_part();
    for (int looks = 0; atomic_load(&active) && looks < LOOKS; looks++) pause_briefly();
    pthread_mutex_lock(&lock);
    while (atomic_load(&active)) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&turn);
}
