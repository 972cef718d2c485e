/* Takes back what vector.h defined, so that it can be included for the next instruction set. */
#undef ISA
#undef ISA_NAME
#undef VECTOR_JOIN_
#undef VECTOR_JOIN
#undef NAME
#undef TARGET
#undef LANES
#undef VEC
#undef vzero
#undef vset1
#undef vload
#undef vstore
#undef vload_bf16
#undef vadd
#undef vmul
#undef vmax
#undef vfma
