/* What one of several threads does of a call: `number` and `threads` are OpenMP's, which these libraries do not link. */

#include <stdint.h>

typedef struct {
    void (*work)(const int64_t *arguments, int64_t begin, int64_t end);
    int (*number)(void), (*threads)(void);
    int64_t count;
    const int64_t *arguments;
} Call;

void part(void *call) {
    const Call *c = call;
    const int64_t number = c->number(), threads = c->threads();
    c->work(c->arguments, c->count * number / threads, c->count * (number + 1) / threads);
}
