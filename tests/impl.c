/* The one translation unit that holds the library's public implementation: compiled once per configuration, linked with
 * tests that see the declarations only. */
#define TRANSFORMER_IMPLEMENTATION
#include "transformer.h"
