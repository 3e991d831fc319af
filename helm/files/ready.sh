# Readiness of a Ray pod, in bash alone: a probe every few seconds should not start an interpreter.
#   ready.sh AGENT_PORT AGENT_PATH [SERVE_PORT]
# Ray's agent must say that its node is well. With SERVE_PORT, a Serve proxy that listens there must
# answer /readyz with 200; a pod without a proxy is ready, it has nothing that could be unready.
status() {
  exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
  printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$2" >&3
  read -r -t 4 _ code _ <&3
  exec 3>&-
  [ "$code" = 200 ]
}
listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

status "$1" "$2" || { echo "Ray is not well on this pod"; exit 1; }
if [ -n "$3" ] && listens "$3"; then
  status "$3" /readyz || { echo "the service is not ready"; exit 1; }
fi
