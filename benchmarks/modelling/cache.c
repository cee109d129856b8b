/* One multiprocessor's first-level cache under the propagation: 128-byte lines of four 32-byte sectors, least recently
 * used out first. Programs are dealt to the multiprocessors in turn; those resident together take their taps in turn.
 *
 * cache HEIGHT WIDTH GROUPS PIXEL_BYTES WEIGHT_BYTES TILE_H TILE_W ROW_STRIDE RESIDENT MULTIPROCESSORS CACHE_BYTES IMAGES
 *       DILATION...
 * prints the bytes that L2 delivers for a pixel and iteration: taps of all groups, and the weights once. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { BUCKETS = 1 << 16 };
typedef struct { int64_t tag; int newer, older, chain; uint8_t sectors; } Line;

static Line *lines;
static int heads[BUCKETS], capacity, used, newest = -1, oldest = -1;
static int64_t missed;

static unsigned bucket(int64_t tag) { return (uint64_t)tag * 0x9E3779B97F4A7C15ull >> 48; }

static void detach(int i) {
    if (lines[i].newer >= 0) lines[lines[i].newer].older = lines[i].older; else newest = lines[i].older;
    if (lines[i].older >= 0) lines[lines[i].older].newer = lines[i].newer; else oldest = lines[i].newer;
}

static void attach(int i) {
    lines[i].newer = -1;
    lines[i].older = newest;
    if (newest >= 0) lines[newest].newer = i;
    newest = i;
    if (oldest < 0) oldest = i;
}

static void touch(int64_t sector) {
    int64_t tag = sector >> 2;
    uint8_t bit = 1 << (sector & 3);
    int i = heads[bucket(tag)];
    while (i >= 0 && lines[i].tag != tag) i = lines[i].chain;
    if (i < 0) {
        if (used < capacity) i = used++;
        else {
            i = oldest;
            int *link = &heads[bucket(lines[i].tag)];
            while (*link != i) link = &lines[*link].chain;
            *link = lines[i].chain;
            detach(i);
        }
        lines[i] = (Line){tag, -1, -1, heads[bucket(tag)], 0};
        heads[bucket(tag)] = i;
        attach(i);
    } else if (newest != i) { detach(i); attach(i); }
    if (!(lines[i].sectors & bit)) { lines[i].sectors |= bit; missed += 32; }
}

static void span(int64_t first, int64_t bytes) {
    for (int64_t s = first >> 5; s <= (first + bytes - 1) >> 5; s++) touch(s);
}

static int clamp(int value, int size) { return value < 0 ? 0 : value >= size ? size - 1 : value; }

int main(int count, char **text) {
    static const int up[8] = {-1, -1, -1, 0, 0, 1, 1, 1}, right[8] = {-1, 0, 1, -1, 1, -1, 0, 1};
    int a[64], n = 0;
    for (int i = 1; i < count && n < 64; i++) a[n++] = atoi(text[i]);
    if (n < 13) return 1;
    int height = a[0], width = a[1], groups = a[2], pixel = a[3], weight = a[4], tile_h = a[5], tile_w = a[6];
    int most = a[7], resident = a[8], processors = a[9], images = a[11], *dilation = a + 12, dilations = n - 12;
    int across = (width + tile_w - 1) / tile_w, down = (height + tile_h - 1) / tile_h, tiles = across * down;
    int total = tiles * images;
    int64_t plane = (int64_t)height * width, pixels = 0, weights = (int64_t)1 << 40;
    capacity = a[10] / 128;
    lines = malloc(sizeof(Line) * capacity);
    /* four multiprocessors stand for all, each with a cache of its own */
    for (int processor = 0; processor < processors; processor += (processors + 3) / 4) {
        for (int i = 0; i < BUCKETS; i++) heads[i] = -1;
        used = 0;
        newest = oldest = -1;
        for (int wave = 0; wave * resident * processors < total; wave++)
            for (int group = 0; group < groups; group++)
                for (int tap = -1; tap < 8 * dilations; tap++)
                    for (int slot = 0; slot < resident; slot++) {
                        int tile = (wave * resident + slot) * processors + processor;
                        if (tile >= total) continue;
                        /* the rows of up to `most` tiles, one below the other, are dealt to them in turn */
                        int image = tile / tiles, row = tile % tiles / across, first = row / most * most;
                        int stride = most < down - first ? most : down - first;
                        int y0 = first * tile_h + row - first, x0 = tile % tiles % across * tile_w;
                        int columns = x0 + tile_w <= width ? tile_w : width - x0;
                        if (tap < 0) {
                            if (group) continue;
                            for (int i = 0; i < tile_h; i++) pixels += y0 + i * stride < height ? columns : 0;
                            for (int p = 0; p < 8 * dilations; p++)
                                for (int y = y0, i = 0; i < tile_h && y < height; i++, y += stride)
                                    span(weights + (((int64_t)image * 8 * dilations + p) * plane + (int64_t)y * width + x0) * weight,
                                         columns * weight);
                            continue;
                        }
                        int dy = up[tap % 8] * dilation[tap / 8], dx = right[tap % 8] * dilation[tap / 8];
                        for (int y = y0, i = 0; i < tile_h; i++, y += stride) {
                            int64_t line = (((int64_t)image * groups + group) * height + clamp(y + dy, height)) * width;
                            int left = clamp(x0 + dx, width), end = clamp(x0 + tile_w - 1 + dx, width);
                            span((line + left) * pixel, (end - left + 1) * (int64_t)pixel);
                        }
                    }
    }
    printf("%.1f\n", (double)missed / pixels);
    return 0;
}
