/*
 * A raw WebSocket load generator: it parses frame headers, counts, and does nothing else, so that
 * the server is what is measured. One process, one thread, epoll, loopback only.
 *
 *   load PORT PATH [-H 'Name: value']... [-s TEXT] [-f FRAMES] [-m MARKER] [-k EVERY] [-r BYTES]
 *        [-n N] [-c TEXT] [-t FILE]
 *
 *   -s  a text frame every connection sends once it is open; a %d in it is replaced as in PATH,
 *       a %5d by five digits of the same, a %c by five digits of the connection's own number, and
 *       a %n by the end of a line; so is it in what connections forward
 *   -f  data frames a connection receives before it counts as ready (greeting, confirmation)
 *   -m  count occurrences of MARKER in the payloads, not frames (for servers that put several
 *       messages into one frame)
 *   -k  record latencies on every k-th connection (default 50)
 *   -r  SO_RCVBUF of the connections
 *   -n  a %d in PATH is replaced by the connection's number modulo this (default: its number)
 *   -t  a file with a token in each line; every connection sends the next one as its bearer token,
 *       and the one after the last the first again
 *   -c  what the confirmation of a forward contains (default: forward_confirmed)
 *
 * Commands are lines on stdin; each is answered by one line of JSON on stdout:
 *
 *   connect N C     open N more connections, at most C of them in the handshake at a time
 *   storm C         reset all connections at once and open as many again
 *   await D S       until D deliveries were counted since `reset`, or S seconds have passed
 *   drain S         until nothing has arrived for half a second, or S seconds have passed
 *   forward S TEXT  for S seconds each connection sends TEXT, awaits its answer, and repeats
 *   trickle N S TEXT  from now on N connections send TEXT every S seconds, one after the other,
 *                   whatever else is waited for; 0 connections end it
 *   stall N         stop reading on N connections that still do
 *   resume          read on all again
 *   reset           forget what was counted
 *   stats           what was counted
 *
 * Latencies are milliseconds since the `"t":<nanoseconds since 1970>` found in a payload; of
 * confirmations, since the forward was sent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#if __has_include(<zlib.h>)
#include <zlib.h>
#define HAVE_ZLIB 1
#endif

enum { MAX_CONNECTIONS = 60000, MAX_SAMPLES = 1 << 20, SOURCES = 8, READ_BYTES = 1 << 18 };
enum { CONNECT_DEADLINE_S = 120 };

enum state { UNUSED, CONNECTING, HANDSHAKE, SETUP, READY, CLOSED };

struct connection {
    int fd;
    enum state state;
    int stalled, sampled, keeps_context, collecting;
    int setup_left;
    double since; /* when connecting began, or the last forward was sent */
    uint8_t header[14];
    int header_length;
    uint64_t remaining;
    char *buffer; /* the handshake's response; later a payload, where one is looked at */
    size_t length, capacity;
    char carry[16]; /* the end of the last piece, where a marker may have begun */
    int carried;
#ifdef HAVE_ZLIB
    z_stream *inflater;
#endif
};

enum waiting { NOTHING, CONNECTS, DELIVERIES, QUIET, FORWARDS };

static struct connection connections[MAX_CONNECTIONS];
static int used, open_now, pending, failed, to_open, at_once, deflated;
static int port, setup_frames, every = 50, receive_buffer, modulus = MAX_CONNECTIONS;
static const char *path, *marker, *first_message, *confirmation = "forward_confirmed";
static char extra_headers[8192];
static char forward_text[65536];
static FILE *tokens;
static int epoll_fd;
static enum waiting waiting;
static double wait_until, connect_started, last_arrival, wait_started;
static uint64_t deliveries, wanted, received_bytes, answers, errors;
static struct samples {
    double values[MAX_SAMPLES];
    size_t count;
} latencies, confirmations;
static int trickling; /* how many connections do */
static double trickle_period, trickle_due;
static uint64_t trickled;
static unsigned closes[5000];
static char scratch[READ_BYTES];

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void sample(struct samples *s, double milliseconds) {
    if (s->count < MAX_SAMPLES) s->values[s->count++] = milliseconds;
}

static void append(struct connection *c, const char *data, size_t length) {
    if (c->length + length + 1 > c->capacity) {
        c->capacity = (c->length + length + 1) * 2;
        c->buffer = realloc(c->buffer, c->capacity);
        if (!c->buffer) die("realloc");
    }
    memcpy(c->buffer + c->length, data, length);
    c->length += length;
    c->buffer[c->length] = 0;
}

/* --- Toward the server ------------------------------------------------------------------------ */

static void send_frame(struct connection *c, int opcode, const char *payload, size_t length) {
    static const uint8_t mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    static char frame[sizeof forward_text + 14];
    size_t at = 0;
    if (length > sizeof forward_text) return;
    frame[at++] = (char)(0x80 | opcode);
    if (length < 126) {
        frame[at++] = (char)(0x80 | length);
    } else {
        frame[at++] = (char)(0x80 | 126);
        frame[at++] = (char)(length >> 8);
        frame[at++] = (char)length;
    }
    memcpy(frame + at, mask, 4);
    at += 4;
    for (size_t i = 0; i < length; i++) frame[at + i] = (char)(payload[i] ^ mask[i & 3]);
    /* The buffer is empty whenever this is called: the generator has one message under way. */
    if (send(c->fd, frame, at + length, MSG_NOSIGNAL) < 0 && errno != EAGAIN) errors++;
}

static void open_connection(struct connection *c) {
    int index = (int)(c - connections);
    struct sockaddr_in here = {.sin_family = AF_INET}, there = {.sin_family = AF_INET};
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = c};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) die("socket");
    if (receive_buffer)
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    /* Several source addresses: one alone has only 28,000 ports. */
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + index % SOURCES);
    if (bind(c->fd, (struct sockaddr *)&here, sizeof here)) die("bind");
    there.sin_port = htons((uint16_t)port);
    there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->state = CONNECTING;
    c->since = now(CLOCK_MONOTONIC);
    c->length = 0;
    c->header_length = c->carried = c->collecting = 0;
    c->setup_left = setup_frames;
    c->sampled = index % every == 0;
    pending++;
    connect(c->fd, (struct sockaddr *)&there, sizeof there);
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
}

static void open_more(void) {
    while (to_open && pending < at_once) {
        to_open--;
        open_connection(&connections[used++]);
    }
}

static void abandon(struct connection *c, unsigned code) {
    if (c->state == CLOSED || c->state == UNUSED) return;
    if (c->state == READY) {
        open_now--;
        if (code < 5000) closes[code]++;
    } else {
        pending--;
        failed++;
    }
    c->state = CLOSED;
    close(c->fd);
}

static void listen_for_input(struct connection *c) {
    struct epoll_event event = {.events = c->stalled ? 0 : EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

/* The template with numbers in place of what stands for them: see -s. */
static void numbered(char *out, size_t room, const char *template, const struct connection *c) {
    int own = (int)(c - connections), number = own % modulus;
    size_t at = 0;
    while (*template && at + 24 < room) {
        if (!strncmp(template, "%d", 2)) {
            at += (size_t)sprintf(out + at, "%d", number);
            template += 2;
        } else if (!strncmp(template, "%5d", 3)) {
            at += (size_t)sprintf(out + at, "%05d", number);
            template += 3;
        } else if (!strncmp(template, "%c", 2)) {
            at += (size_t)sprintf(out + at, "%05d", own);
            template += 2;
        } else if (!strncmp(template, "%n", 2)) {
            at += (size_t)sprintf(out + at, "\r\n");
            template += 2;
        } else {
            out[at++] = *template++;
        }
    }
    out[at] = 0;
}

static void send_request(struct connection *c) {
    char request[sizeof extra_headers + 8192], token[4096] = "";
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        abandon(c, 1006);
        return;
    }
    char target[512];
    numbered(target, sizeof target, path, c);
    if (tokens && !fgets(token, sizeof token - 64, tokens)) {
        rewind(tokens);
        if (!fgets(token, sizeof token - 64, tokens)) die("tokens");
    }
    if (tokens) {
        char line[sizeof token];
        token[strcspn(token, "\n")] = 0;
        snprintf(line, sizeof line, "Authorization: Bearer %s\r\n", token);
        strcpy(token, line);
    }
    int length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                          "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                          "Sec-WebSocket-Version: 13\r\n%s%s\r\n",
                          target, port, extra_headers, token);
    c->state = HANDSHAKE;
    listen_for_input(c);
    if (send(c->fd, request, (size_t)length, MSG_NOSIGNAL) != length) abandon(c, 1006);
}

/* --- From the server -------------------------------------------------------------------------- */

static void ready(struct connection *c) {
    c->state = READY;
    pending--;
    open_now++;
    sample(&latencies, (now(CLOCK_MONOTONIC) - c->since) * 1e3);
}

static void forward(struct connection *c) {
    static char text[sizeof forward_text];
    numbered(text, sizeof text, forward_text, c);
    c->since = now(CLOCK_MONOTONIC);
    send_frame(c, 1, text, strlen(text));
}

static void trickle(void) {
    double t = now(CLOCK_MONOTONIC);
    while (trickling && used && trickle_due <= t) {
        int stride = used / trickling ? used / trickling : 1;
        struct connection *c = &connections[(trickled++ % (uint64_t)trickling) * (uint64_t)stride];
        if (c->state == READY) forward(c);
        trickle_due += trickle_period / trickling;
    }
}

static void read_latency(const char *data, size_t length) {
    const char *found = memmem(data, length, "\"t\":", 4);
    if (found && found + 23 <= data + length) {
        double sent = (double)strtoull(found + 4, NULL, 10) / 1e9;
        sample(&latencies, (now(CLOCK_REALTIME) - sent) * 1e3);
    }
}

/* Whether a payload says the forward was accepted. */
static int confirms(const char *data, size_t length) {
    return memmem(data, length, confirmation, strlen(confirmation)) != NULL;
}

#ifdef HAVE_ZLIB
/* The payload of a deflated message in plain; 0 if it is broken. */
static size_t inflate_payload(struct connection *c, char *out, size_t room) {
    static z_stream shared; /* for all whose messages stand alone */
    static int shared_ready;
    if (c->keeps_context && !c->inflater) {
        c->inflater = calloc(1, sizeof *c->inflater);
        if (!c->inflater || inflateInit2(c->inflater, -15) != Z_OK) die("inflateInit2");
    }
    if (!c->keeps_context && !shared_ready++ && inflateInit2(&shared, -15) != Z_OK)
        die("inflateInit2");
    z_stream *z = c->keeps_context ? c->inflater : &shared;
    if (!c->keeps_context) inflateReset(z);
    append(c, "\0\0\377\377", 4); /* what a sender leaves out */
    z->next_in = (Bytef *)c->buffer;
    z->avail_in = (uInt)c->length;
    z->next_out = (Bytef *)out;
    z->avail_out = (uInt)room;
    int result = inflate(z, Z_SYNC_FLUSH);
    return result == Z_OK || result == Z_BUF_ERROR ? room - z->avail_out : 0;
}
#endif

static void count_markers(struct connection *c, const char *data, size_t length) {
    static char joined[READ_BYTES + 64]; /* an inflated payload is smaller, too */
    size_t size = strlen(marker), total = (size_t)c->carried + length;
    memcpy(joined, c->carry, (size_t)c->carried);
    memcpy(joined + c->carried, data, length);
    const char *at = joined, *end = joined + total;
    while ((at = memmem(at, (size_t)(end - at), marker, size))) {
        deliveries++;
        if (c->sampled && at + 24 < end) read_latency(at, (size_t)(end - at));
        at += size;
    }
    c->carried = (int)(total < size - 1 ? total : size - 1);
    memcpy(c->carry, end - c->carried, (size_t)c->carried);
}

static void look_at(struct connection *c) {
    const char *data = c->buffer;
    size_t length = c->length;
#ifdef HAVE_ZLIB
    static char plain[1 << 17];
    if (c->header[0] & 0x40) {
        length = inflate_payload(c, plain, sizeof plain);
        data = plain;
    }
#else
    if (c->header[0] & 0x40) return;
#endif
    if (waiting == FORWARDS) {
        if (confirms(data, length)) {
            answers++;
            sample(&latencies, (now(CLOCK_MONOTONIC) - c->since) * 1e3);
        } else if (memmem(data, length, "\"error\"", 7)) {
            errors++;
        } else {
            return;
        }
        forward(c);
        return;
    }
    if (trickling && confirms(data, length)) {
        answers++;
        sample(&confirmations, (now(CLOCK_MONOTONIC) - c->since) * 1e3);
    } else if (trickling && memmem(data, length, "\"type\":\"error\"", 14)) {
        errors++;
    } else if (!marker) {
        read_latency(data, length);
    } else if (c->header[0] & 0x40 && c->state == READY) {
        count_markers(c, data, length);
    }
}

static void on_frame(struct connection *c) {
    int opcode = c->header[0] & 0x0f;
    if (opcode == 9) {
        send_frame(c, 10, c->buffer, c->length);
    } else if (opcode == 8) {
        unsigned code = 1005;
        if (c->length >= 2) code = (unsigned)(uint8_t)c->buffer[0] << 8 | (uint8_t)c->buffer[1];
        send_frame(c, 8, c->buffer, c->length < 2 ? 0 : 2);
        abandon(c, code);
    } else if (opcode < 3 && c->header[0] & 0x80) {
        if (c->state == SETUP) {
            if (--c->setup_left == 0) ready(c);
#ifdef HAVE_ZLIB
            /* A context that is kept has to see every message from the first on. */
            if (c->collecting && c->keeps_context && c->header[0] & 0x40) look_at(c);
#endif
        } else {
            if (!marker) deliveries++;
            if (c->collecting) look_at(c);
        }
    }
}

static void on_payload(struct connection *c, const char *data, size_t length) {
    if (c->collecting) append(c, data, length);
    int plain = !(c->header[0] & 0x48); /* neither deflated nor a control frame */
    if (marker && c->state == READY && plain) count_markers(c, data, length);
}

static void on_bytes(struct connection *c, const char *data, size_t length) {
    while (length && c->state >= SETUP && c->state != CLOSED) {
        if (!c->remaining && c->header_length >= 0) {
            c->header[c->header_length++] = (uint8_t)*data++;
            length--;
            int kind = c->header_length > 1 ? c->header[1] & 0x7f : 0;
            int need = c->header_length < 2 ? 2 : kind == 127 ? 10 : kind == 126 ? 4 : 2;
            if (c->header_length < need) continue;
            c->remaining = need == 2 ? (uint64_t)kind : 0;
            for (int i = 2; i < need; i++) c->remaining = c->remaining << 8 | c->header[i];
            c->header_length = -1; /* complete */
            c->collecting = c->sampled || trickling || waiting == FORWARDS || (c->header[0] & 8) ||
                            (marker && c->header[0] & 0x40);
            c->length = 0;
        }
        size_t piece = c->remaining < length ? c->remaining : length;
        if (piece) on_payload(c, data, piece);
        c->remaining -= piece;
        data += piece;
        length -= piece;
        if (!c->remaining) {
            c->header_length = 0;
            on_frame(c);
        }
    }
}

static void on_response(struct connection *c, const char *data, size_t length) {
    append(c, data, length);
    char *end = memmem(c->buffer, c->length, "\r\n\r\n", 4);
    if (!end) return;
    if (c->length < 12 || memcmp(c->buffer + 9, "101", 3)) {
        abandon(c, 1006);
        return;
    }
    char *rest = end + 4;
    size_t left = c->length - (size_t)(rest - c->buffer);
    *end = 0;
    if (strcasestr(c->buffer, "permessage-deflate")) deflated++;
    c->keeps_context = !strcasestr(c->buffer, "server_no_context_takeover");
    char *frames = malloc(left + 1);
    if (!frames) die("malloc");
    memcpy(frames, rest, left);
    c->length = 0;
    c->state = SETUP;
    if (first_message) {
        char text[4096];
        numbered(text, sizeof text, first_message, c);
        send_frame(c, 1, text, strlen(text));
    }
    if (!setup_frames) ready(c);
    on_bytes(c, frames, left);
    free(frames);
}

static void on_readable(struct connection *c) {
    ssize_t length = recv(c->fd, scratch, sizeof scratch, 0);
    if (length <= 0) {
        if (length == 0 || (errno != EAGAIN && errno != EINTR)) abandon(c, 1006);
        return;
    }
    received_bytes += (uint64_t)length;
    last_arrival = now(CLOCK_MONOTONIC);
    if (c->state == HANDSHAKE)
        on_response(c, scratch, (size_t)length);
    else
        on_bytes(c, scratch, (size_t)length);
}

/* --- Commands --------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile(const struct samples *s, double share) {
    return s->count ? s->values[(size_t)(share * (double)(s->count - 1))] : 0;
}

static void forget(void) {
    deliveries = received_bytes = answers = errors = 0;
    latencies.count = confirmations.count = 0;
    failed = 0;
    memset(closes, 0, sizeof closes);
}

static void report(void) {
    double t = now(CLOCK_MONOTONIC);
    qsort(latencies.values, latencies.count, sizeof(double), ascending);
    qsort(confirmations.values, confirmations.count, sizeof(double), ascending);
    printf("{\"open\":%d,\"failed\":%d,\"deflated\":%d,\"deliveries\":%llu,\"bytes\":%llu,"
           "\"answers\":%llu,\"errors\":%llu,\"seconds\":%.6f,\"samples\":%zu,\"p50_ms\":%.3f,"
           "\"p99_ms\":%.3f,\"max_ms\":%.3f,\"confirmed_p50_ms\":%.3f,\"confirmed_p99_ms\":%.3f,"
           "\"closes\":{",
           open_now, failed, deflated, (unsigned long long)deliveries,
           (unsigned long long)received_bytes, (unsigned long long)answers,
           (unsigned long long)errors, t - wait_started, latencies.count,
           percentile(&latencies, 0.5), percentile(&latencies, 0.99), percentile(&latencies, 1),
           percentile(&confirmations, 0.5), percentile(&confirmations, 0.99));
    const char *comma = "";
    for (int code = 0; code < 5000; code++)
        if (closes[code]) {
            printf("%s\"%d\":%u", comma, code, closes[code]);
            comma = ",";
        }
    printf("}}\n");
    fflush(stdout);
}

static void reset_all(void) {
    struct linger now_at_once = {.l_onoff = 1};
    for (int i = 0; i < used; i++) {
        struct connection *c = &connections[i];
        if (c->state != CLOSED) {
            setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now_at_once, sizeof now_at_once);
            close(c->fd);
        }
#ifdef HAVE_ZLIB
        if (c->inflater) {
            inflateEnd(c->inflater);
            free(c->inflater);
        }
#endif
        free(c->buffer);
        memset(c, 0, sizeof *c);
    }
    used = open_now = pending = deflated = 0;
}

static void stall(int count) {
    for (int i = 0; i < used && count > 0; i++)
        if (connections[i].state == READY && !connections[i].stalled) {
            connections[i].stalled = 1;
            listen_for_input(&connections[i]);
            count--;
        }
}

static void resume(void) {
    for (int i = 0; i < used; i++)
        if (connections[i].stalled) {
            connections[i].stalled = 0;
            if (connections[i].state == READY) listen_for_input(&connections[i]);
        }
}

static void begin(enum waiting what, double seconds) {
    waiting = what;
    wait_started = last_arrival = now(CLOCK_MONOTONIC);
    wait_until = wait_started + seconds;
}

static void on_command(char *line) {
    int count = 0;
    double seconds = 0;
    if (sscanf(line, "connect %d %d", &count, &at_once) == 2) {
        if (used + count > MAX_CONNECTIONS) count = MAX_CONNECTIONS - used;
        to_open = count;
        connect_started = now(CLOCK_MONOTONIC);
        begin(CONNECTS, CONNECT_DEADLINE_S);
        open_more();
        return;
    }
    if (sscanf(line, "storm %d", &at_once) == 1) {
        to_open = used;
        reset_all();
        forget();
        begin(CONNECTS, CONNECT_DEADLINE_S);
        open_more();
        return;
    }
    if (sscanf(line, "await %llu %lf", (unsigned long long *)&wanted, &seconds) == 2) {
        begin(DELIVERIES, seconds);
        return;
    }
    if (sscanf(line, "drain %lf", &seconds) == 1) {
        begin(QUIET, seconds);
        return;
    }
    int text_at = 0;
    if (sscanf(line, "forward %lf %n", &seconds, &text_at) == 1 && text_at) {
        snprintf(forward_text, sizeof forward_text, "%s", line + text_at);
        begin(FORWARDS, seconds);
        for (int i = 0; i < used; i++)
            if (connections[i].state == READY) forward(&connections[i]);
        return;
    }
    if (sscanf(line, "trickle %d %lf %n", &trickling, &trickle_period, &text_at) == 2) {
        snprintf(forward_text, sizeof forward_text, "%s", line + text_at);
        trickle_due = now(CLOCK_MONOTONIC);
        trickled = 0;
    }
    if (sscanf(line, "stall %d", &count) == 1) stall(count);
    if (!strcmp(line, "resume")) resume();
    if (!strcmp(line, "reset")) forget();
    report();
}

static void check_wait(void) {
    double t = now(CLOCK_MONOTONIC);
    int done = t > wait_until;
    switch (waiting) {
        case NOTHING: return;
        case CONNECTS: done |= !to_open && !pending; break;
        case DELIVERIES: done |= deliveries >= wanted || !open_now; break;
        case QUIET: done |= t - last_arrival > 0.5; break;
        case FORWARDS: break;
    }
    if (!done) return;
    to_open = 0;
    waiting = NOTHING;
    report();
}

static void on_stdin(void) {
    static char input[sizeof forward_text];
    static size_t length;
    ssize_t got = read(0, input + length, sizeof input - length - 1);
    if (got <= 0) exit(0);
    length += (size_t)got;
    input[length] = 0;
    char *end;
    while ((end = memchr(input, '\n', length))) {
        *end = 0;
        on_command(input);
        length -= (size_t)(end + 1 - input);
        memmove(input, end + 1, length);
    }
}

int main(int argc, char **argv) {
    int option;
    struct rlimit files;
    while ((option = getopt(argc, argv, "H:s:f:m:k:r:n:c:t:")) != -1) {
        size_t at = strlen(extra_headers);
        switch (option) {
            case 'H':
                snprintf(extra_headers + at, sizeof extra_headers - at, "%s\r\n", optarg);
                break;
            case 's': first_message = optarg; break;
            case 'f': setup_frames = atoi(optarg); break;
            case 'm': marker = optarg; break;
            case 'k': every = atoi(optarg); break;
            case 'n': modulus = atoi(optarg); break;
            case 't':
                tokens = fopen(optarg, "r");
                if (!tokens) die(optarg);
                break;
            case 'c': confirmation = optarg; break;
            case 'r': receive_buffer = atoi(optarg); break;
            default: return 2;
        }
    }
    if (argc - optind != 2 || every < 1 || modulus < 1 ||
        (marker && strlen(marker) > sizeof connections->carry))
        return 2;
    port = atoi(argv[optind]);
    path = argv[optind + 1];
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epoll_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &event)) die("stdin");
    for (;;) {
        struct epoll_event events[512];
        int patience_ms = trickling ? 2 : waiting == NOTHING ? -1 : 20;
        int count = epoll_wait(epoll_fd, events, 512, patience_ms);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) {
                on_stdin();
                break; /* a command may have closed what later events are about */
            }
            if (c->state == CONNECTING)
                send_request(c);
            else if (c->state != CLOSED && c->state != UNUSED)
                on_readable(c);
        }
        open_more();
        trickle();
        check_wait();
    }
}
