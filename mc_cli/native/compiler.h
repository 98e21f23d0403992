/* Requests to compilers. VERSIONS: one copy of a function for each level of the processor, chosen at run time. */
#ifndef MC_COMPILER_H
#define MC_COMPILER_H

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && !defined(__clang__) && defined(__GNUC__) /* earlier GCC knows no levels */
#define VERSIONS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VERSIONS
#endif
#define INLINE static inline __attribute__((always_inline))

/* A vector of four: its a-th value twice, then its b-th twice. a and b are constants. */
#if defined(__clang__)
#define TWICE_EACH(v, a, b) __builtin_shufflevector(v, v, a, a, b, b)
#else
typedef int mc_four_ints __attribute__((vector_size(16)));
#define TWICE_EACH(v, a, b) __builtin_shuffle(v, (mc_four_ints){a, a, b, b})
#endif

#endif
