# Two nodes: this network namespace and another, with a wire between them. Run it under `unshare --user --map-root-user
# --net`; $1 and $2 are the commands of the nodes, whose output goes to node0.log and node1.log.
set -u
wired() {
    ip link set lo up &&
        ip link add wire0 type veth peer name wire1 netns "$other" &&
        ip addr add 10.7.0.1/24 dev wire0 && ip link set wire0 up &&
        nsenter --target "$other" --net sh -c "ip link set lo up; ip addr add 10.7.0.2/24 dev wire1; ip link set wire1 up"
}
unshare --net sleep 600 &
other=$!
trap 'kill $other' EXIT
until [ "$(readlink "/proc/$other/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
wired || exit 77
nsenter --target "$other" --net bash -c "$2" >node1.log 2>&1 &
second=$!
bash -c "$1" >node0.log 2>&1
first=$?
wait $second
echo "$first $?"
