/* A chat completion server with a known schedule: what the clients are measured against.
 *
 * usage: mock PORT LOG TTFT_US ITL_US TOKENS TOKENS_PER_CHUNK FRAGMENT
 *
 * One thread, epoll, HTTP/1.1 with keep-alive. Every POST is answered like vLLM streams: a role chunk together with
 * the first content chunk TTFT_US after the request was read, one content chunk every ITL_US, a finish chunk, the
 * usage chunk, [DONE]. TOKENS is overruled by max_tokens or max_completion_tokens of the request when TOKENS is 0.
 * ITL_US 0 sends everything in one write. FRAGMENT > 0 cuts the stream into writes of that many bytes and the text is
 * Chinese. "continuous_usage_stats":true adds the usage so far to each chunk. SIGUSR1 stalls all writes for 2 s.
 *
 * LOG gets one line per reply: its number, seconds (CLOCK_MONOTONIC) at which the request had been read, the first
 * and the last content chunk were written, and the tokens; then lines with the time a stall began ("stall") and the number of connections
 * ("connections"). Truth is what was written, not what was planned.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 4096, INPUT = 1 << 16, STALL_US = 2000000 };

typedef struct {
  int fd, id, tokens, sent, usage, heap_index;
  int64_t due, read_at, first_at, last_at;
  size_t filled, capacity, wanted; /* the request: bytes held, allocated, needed (0: head not complete) */
  char *input, *output;            /* what the kernel did not take yet */
  size_t output_from, output_to, output_capacity;
} connection;

static connection *by_fd[MAX_CONNECTIONS], *heap[MAX_CONNECTIONS];
static int heap_size, next_id, poller, accepted;
static int64_t ttft_us, itl_us;
static int tokens_setting, per_chunk, fragment;
static FILE *journal;
static volatile sig_atomic_t stall_wanted, stop_wanted;

static int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void place(int i, connection *c) { heap[i] = c, c->heap_index = i; }

static void sift(int i) {
  connection *c = heap[i];
  for (int parent; i > 0 && heap[parent = (i - 1) / 2]->due > c->due; i = parent) place(i, heap[parent]);
  for (int child; (child = 2 * i + 1) < heap_size; i = child) {
    if (child + 1 < heap_size && heap[child + 1]->due < heap[child]->due) child++;
    if (heap[child]->due >= c->due) break;
    place(i, heap[child]);
  }
  place(i, c);
}

static void schedule(connection *c, int64_t due) {
  c->due = due;
  if (c->heap_index < 0) place(heap_size++, c);
  sift(c->heap_index);
}

static void unschedule(connection *c) {
  int i = c->heap_index;
  if (i < 0) return;
  c->heap_index = -1;
  if (i == --heap_size) return;
  place(i, heap[heap_size]);
  sift(i);
}

static void drop(connection *c) {
  unschedule(c);
  by_fd[c->fd] = NULL;
  close(c->fd);
  free(c->input), free(c->output), free(c);
}

static void watch(connection *c, uint32_t events) {
  struct epoll_event event = {.events = events, .data.fd = c->fd};
  epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

/* Writes what it can and keeps the rest; -1 when the peer is gone. */
static int push(connection *c, const char *bytes, size_t size) {
  ssize_t done = 0;
  if (c->output_from == c->output_to) {
    done = send(c->fd, bytes, size, MSG_NOSIGNAL);
    if (done < 0 && errno != EAGAIN) return -1;
    if (done < 0) done = 0;
    if ((size_t)done == size) return 0;
    c->output_from = c->output_to = 0;
    watch(c, EPOLLIN | EPOLLOUT);
  }
  size -= (size_t)done;
  if (c->output_to + size > c->output_capacity) {
    c->output_capacity = c->output_to + size;
    c->output = realloc(c->output, c->output_capacity);
  }
  memcpy(c->output + c->output_to, bytes + done, size);
  c->output_to += size;
  return 0;
}

static const char HEAD[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                           "transfer-encoding: chunked\r\n\r\n";

static int event(char *out, const connection *c, const char *choices, int tokens, int with_usage) {
  char body[1024];
  int size = snprintf(body, sizeof body,
                      "data: {\"id\":\"chatcmpl-%08x\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
                      "\"model\":\"glm-ocr\",\"choices\":[%s]", c->id, choices);
  if (with_usage)
    size += snprintf(body + size, sizeof body - (size_t)size,
                     ",\"usage\":{\"prompt_tokens\":128,\"total_tokens\":%d,\"completion_tokens\":%d}", 128 + tokens,
                     tokens);
  size += snprintf(body + size, sizeof body - (size_t)size, "}\n\n");
  return sprintf(out, "%x\r\n%s\r\n", size, body);
}

/* The chunk after `sent` tokens, with what belongs before and after it; returns its size. */
static int render(char *out, connection *c) {
  char choice[512], *at = out;
  if (c->sent == 0) {
    at += sprintf(at, "%s", HEAD);
    at += event(at, c, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,"
                       "\"finish_reason\":null}", 0, c->usage);
  }
  int tokens = c->tokens - c->sent < per_chunk ? c->tokens - c->sent : per_chunk;
  int size = sprintf(choice, "{\"index\":0,\"delta\":{\"content\":\"");
  for (int i = 0; i < tokens; i++) size += sprintf(choice + size, fragment ? "文字" : "token ");
  sprintf(choice + size, "\"},\"logprobs\":null,\"finish_reason\":null}");
  c->sent += tokens;
  at += event(at, c, choice, c->sent, c->usage);
  if (c->sent == c->tokens) {
    at += event(at, c, "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"length\"}", c->sent, c->usage);
    at += event(at, c, "", c->sent, 1);
    at += sprintf(at, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
  }
  return (int)(at - out);
}

/* One due write: everything when there is no schedule, else one chunk. */
static int advance(connection *c) {
  static char out[1 << 20];
  int first = c->sent == 0, size = 0;
  do size += render(out + size, c); while (!itl_us && c->sent < c->tokens);
  int64_t start = c->due;
  if (fragment) {
    /* Each fragment is its own segment: TCP_NODELAY is set, and a pause lets the reader take it. */
    for (int from = 0; from < size; from += fragment) {
      if (push(c, out + from, (size_t)(size - from < fragment ? size - from : fragment))) return -1;
      usleep(20);
    }
  } else if (push(c, out, (size_t)size)) return -1;
  c->last_at = now_us();
  if (first) c->first_at = c->last_at;
  if (c->sent < c->tokens) {
    schedule(c, start + itl_us);
  } else {
    unschedule(c);
    fprintf(journal, "%d %.6f %.6f %.6f %d\n", c->id, c->read_at / 1e6, c->first_at / 1e6, c->last_at / 1e6, c->tokens);
  }
  return 0;
}

static int number_after(const char *text, const char *key) {
  const char *at = strstr(text, key);
  return at ? atoi(at + strlen(key)) : 0;
}

static int answer(connection *c) {
  static const char models[] = "{\"object\":\"list\",\"data\":[{\"id\":\"glm-ocr\",\"object\":\"model\","
                               "\"owned_by\":\"mock\",\"max_model_len\":8192}]}";
  if (strncmp(c->input, "POST ", 5)) {
    char reply[512];
    int known = !strncmp(c->input, "GET /v1/models", 14) || !strncmp(c->input, "GET /health", 11);
    const char *body = known ? models : "";
    int size = sprintf(reply, "HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
                       known ? "200 OK" : "404 Not Found", strlen(body), body);
    return push(c, reply, (size_t)size);
  }
  const char *body = strstr(c->input, "\r\n\r\n");
  c->read_at = now_us();
  c->tokens = tokens_setting;
  if (!c->tokens) {
    for (int spaced = 0; spaced < 2 && !c->tokens; spaced++) {
      c->tokens = number_after(body, spaced ? "\"max_tokens\": " : "\"max_tokens\":");
      if (!c->tokens) c->tokens = number_after(body, spaced ? "\"max_completion_tokens\": " : "\"max_completion_tokens\":");
    }
  }
  if (c->tokens < 1) c->tokens = 128;
  c->usage = strstr(body, "\"continuous_usage_stats\":true") || strstr(body, "\"continuous_usage_stats\": true");
  c->sent = 0, c->id = ++next_id;
  schedule(c, c->read_at + ttft_us);
  return ttft_us ? 0 : advance(c);
}

/* Reads; answers each complete request. */
static int pull(connection *c) {
  if (c->capacity - c->filled < INPUT + 1) {
    c->capacity = 2 * c->capacity + 2 * INPUT;
    c->input = realloc(c->input, c->capacity);
  }
  ssize_t size = recv(c->fd, c->input + c->filled, c->capacity - c->filled - 1, 0);
  if (size == 0 || (size < 0 && errno != EAGAIN)) return -1;
  if (size < 0) return 0;
  c->filled += (size_t)size;
  c->input[c->filled] = 0;
  if (!c->wanted) {
    char *end = strstr(c->input, "\r\n\r\n");
    if (!end) return 0;
    char *length = strcasestr(c->input, "\r\ncontent-length:");
    c->wanted = (size_t)(end + 4 - c->input) + (length && length < end ? strtoul(length + 17, NULL, 10) : 0);
    if (strcasestr(c->input, "\r\nexpect: 100-continue")) push(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
  }
  if (c->filled < c->wanted) return 0;
  c->filled = c->wanted = 0; /* no pipelining: clients wait for the reply */
  return answer(c);
}

static void on_signal(int number) {
  if (number == SIGUSR1) stall_wanted = 1;
  else stop_wanted = 1;
}

int main(int argc, char **argv) {
  if (argc != 8) return fprintf(stderr, "usage: mock PORT LOG TTFT_US ITL_US TOKENS TOKENS_PER_CHUNK FRAGMENT\n"), 2;
  journal = fopen(argv[2], "w");
  if (journal) setvbuf(journal, NULL, _IOLBF, 0);
  ttft_us = atoll(argv[3]), itl_us = atoll(argv[4]);
  tokens_setting = atoi(argv[5]), per_chunk = atoi(argv[6]), fragment = atoi(argv[7]);
  signal(SIGUSR1, on_signal), signal(SIGTERM, on_signal);
  int yes = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t address_size = sizeof address;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (!journal || bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) return perror("mock"), 2;
  getsockname(listener, (void *)&address, &address_size);
  printf("%d\n", ntohs(address.sin_port)), fflush(stdout);
  poller = epoll_create1(0);
  struct epoll_event ready[512], accepting = {.events = EPOLLIN, .data.fd = listener};
  epoll_ctl(poller, EPOLL_CTL_ADD, listener, &accepting);
  while (!stop_wanted) {
    struct timespec wait = {0, 0}, *timeout = NULL;
    if (heap_size) {
      int64_t left = heap[0]->due - now_us();
      if (left > 0) wait.tv_sec = left / 1000000, wait.tv_nsec = left % 1000000 * 1000;
      timeout = &wait;
    }
    int count = epoll_pwait2(poller, ready, 512, timeout, NULL);
    if (stall_wanted) {
      stall_wanted = 0;
      fprintf(journal, "stall %.6f\n", now_us() / 1e6);
      usleep(STALL_US);
    }
    for (int i = 0; i < count; i++) {
      int fd = ready[i].data.fd;
      if (fd == listener) {
        for (int client; (client = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
          accepted++;
          if (client >= MAX_CONNECTIONS) { close(client); continue; }
          connection *c = by_fd[client] = calloc(1, sizeof *c);
          c->fd = client, c->heap_index = -1;
          setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
          struct epoll_event reading = {.events = EPOLLIN, .data.fd = client};
          epoll_ctl(poller, EPOLL_CTL_ADD, client, &reading);
        }
        continue;
      }
      connection *c = by_fd[fd];
      if (c && ready[i].events & EPOLLOUT) {
        ssize_t done = send(fd, c->output + c->output_from, c->output_to - c->output_from, MSG_NOSIGNAL);
        if (done > 0) c->output_from += (size_t)done;
        if (c->output_from == c->output_to) watch(c, EPOLLIN);
      }
      if (c && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && pull(c)) drop(c);
    }
    for (int64_t now = now_us(); heap_size && heap[0]->due <= now;)
      if (advance(heap[0])) drop(heap[0]);
  }
  fprintf(journal, "connections %d\n", accepted);
  fclose(journal);
  return 0;
}
