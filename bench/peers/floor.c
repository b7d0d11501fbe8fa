/*
 * The floor: a WebSocket server in C that does one send() a message and client, and nothing else.
 * It reads events as lines from a local TCP connection like the other peers, frames each once, and
 * knows of the protocol only the handshake.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_FILES = 65536, LINE_BYTES = 1 << 20 };
enum kind { FREE, NEW, CLIENT, FEED };

static enum kind kinds[MAX_FILES];
static int clients[MAX_FILES], client_count;

static void sha1(const uint8_t *message, size_t length, uint8_t digest[20]) {
    uint32_t h[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    uint8_t block[192] = {0};
    size_t total = ((length + 8) / 64 + 1) * 64;
    memcpy(block, message, length);
    block[length] = 0x80;
    for (int i = 0; i < 8; i++) block[total - 1 - (size_t)i] = (uint8_t)(length * 8 >> (8 * i));
    for (size_t at = 0; at < total; at += 64) {
        uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
        for (int i = 0; i < 80; i++) {
            if (i < 16) {
                const uint8_t *p = block + at + 4 * i;
                w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
            } else {
                uint32_t x = w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16];
                w[i] = x << 1 | x >> 31;
            }
            uint32_t f = i < 20   ? ((b & c) | (~b & d)) + 0x5a827999
                         : i < 40 ? (b ^ c ^ d) + 0x6ed9eba1
                         : i < 60 ? ((b & c) | (b & d) | (c & d)) + 0x8f1bbcdc
                                  : (b ^ c ^ d) + 0xca62c1d6;
            uint32_t next = (a << 5 | a >> 27) + f + e + w[i];
            e = d, d = c, c = b << 30 | b >> 2, b = a, a = next;
        }
        h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
    }
    for (int i = 0; i < 20; i++) digest[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
}

static void accept_key(const char *key, char out[29]) {
    static const char letters[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char joined[64];
    uint8_t digest[21] = {0};
    snprintf(joined, sizeof joined, "%.24s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key);
    sha1((const uint8_t *)joined, strlen(joined), digest);
    for (int i = 0; i < 7; i++) {
        uint32_t bits = (uint32_t)digest[3 * i] << 16 | (uint32_t)digest[3 * i + 1] << 8 |
                        digest[3 * i + 2];
        for (int j = 0; j < 4; j++) out[4 * i + j] = letters[bits >> (18 - 6 * j) & 63];
    }
    out[27] = '=';
    out[28] = 0;
}

static void drop(int fd) {
    for (int i = 0; i < client_count; i++)
        if (clients[i] == fd) clients[i] = clients[--client_count];
    kinds[fd] = FREE;
    close(fd);
}

static void handshake(int fd) {
    char request[8192], response[256], accepted[29];
    ssize_t length = recv(fd, request, sizeof request - 1, 0);
    if (length <= 0) {
        drop(fd);
        return;
    }
    request[length] = 0;
    char *key = strcasestr(request, "sec-websocket-key: ");
    if (!key || !strstr(request, "\r\n\r\n")) {
        drop(fd); /* the load generator sends its request in one piece */
        return;
    }
    accept_key(key + 19, accepted);
    int size = snprintf(response, sizeof response,
                        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                        "Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
                        accepted);
    if (send(fd, response, (size_t)size, MSG_NOSIGNAL) != size) {
        drop(fd);
        return;
    }
    kinds[fd] = CLIENT;
    clients[client_count++] = fd;
}

static void broadcast(const char *line, size_t length) {
    static char frame[LINE_BYTES + 4];
    size_t head = 2;
    frame[0] = (char)0x81;
    if (length < 126) {
        frame[1] = (char)length;
    } else {
        frame[1] = 126;
        frame[2] = (char)(length >> 8);
        frame[3] = (char)length;
        head = 4;
    }
    memcpy(frame + head, line, length);
    for (int i = 0; i < client_count; i++)
        send(clients[i], frame, head + length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void read_feed(int fd) {
    static char lines[LINE_BYTES];
    static size_t length;
    ssize_t got = recv(fd, lines + length, sizeof lines - length, 0);
    if (got <= 0) {
        drop(fd);
        return;
    }
    length += (size_t)got;
    char *at = lines, *end;
    while ((end = memchr(at, '\n', length - (size_t)(at - lines)))) {
        broadcast(at, (size_t)(end - at));
        at = end + 1;
    }
    length -= (size_t)(at - lines);
    memmove(lines, at, length);
}

static int listen_on_free_port(int *port) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof here;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof here) || listen(fd, 4096)) exit(1);
    getsockname(fd, (struct sockaddr *)&here, &size);
    *port = ntohs(here.sin_port);
    return fd;
}

int main(void) {
    int port, feed, one = 1, epoll_fd = epoll_create1(0);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    int listening[2] = {listen_on_free_port(&port), listen_on_free_port(&feed)};
    for (int i = 0; i < 2; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = listening[i]};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listening[i], &event);
    }
    printf("{\"port\": %d, \"feed\": %d}\n", port, feed);
    fflush(stdout);
    for (;;) {
        struct epoll_event events[512];
        int count = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listening[0] || fd == listening[1]) {
                int new = accept(fd, NULL, NULL);
                if (new < 0 || new >= MAX_FILES) continue;
                struct epoll_event event = {.events = EPOLLIN, .data.fd = new};
                setsockopt(new, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                kinds[new] = fd == listening[0] ? NEW : FEED;
                epoll_ctl(epoll_fd, EPOLL_CTL_ADD, new, &event);
            } else if (kinds[fd] == NEW) {
                handshake(fd);
            } else if (kinds[fd] == FEED) {
                read_feed(fd);
            } else if (kinds[fd] == CLIENT) {
                char ignored[4096];
                if (recv(fd, ignored, sizeof ignored, 0) <= 0) drop(fd);
            }
        }
    }
}
