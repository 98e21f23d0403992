/* What compilers are asked for. VERSIONS: one copy of a function for each level of the processor, chosen at run time. */
#ifndef MC_COMPILER_H
#define MC_COMPILER_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif
#define INLINE static inline __attribute__((always_inline))

#endif
