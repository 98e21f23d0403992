/* Threads that wait between calls, so that a short piece of work can be divided. */
#ifndef MC_THREADS_H
#define MC_THREADS_H

typedef void (*mc_work)(void *context, int index);

/* work(context, 0 .. count - 1), each once, on up to `threads` threads, the caller's among them; returns when all are
 * done. Calls from several threads at once follow each other. */
void mc_parallel(mc_work work, void *context, int count, int threads);

#endif
