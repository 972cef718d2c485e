/* Every kernel over odd sizes on each instruction set that there is. */
#include "cases.h"

int32_t loraplex_best_isa(void);

int main(void) {
    for (int32_t isa = 0; isa <= loraplex_best_isa(); isa++) {
        products(isa);
        deltas(isa);
        attention(isa);
        rows(isa);
        layer(isa);
    }
    puts("clean");
    return 0;
}
