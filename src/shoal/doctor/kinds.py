"""The table of all kinds of findings. `docs/guides/troubleshooting.md` has the same rows; a test compares them."""

from dataclasses import dataclass

from shoal.wire.doctor import Finding, Level


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding: what is checked, what it means if it is not in order, and how to mend it."""

    id: str
    title: str
    meaning: str
    mend: str


_ROWS: tuple[Kind, ...] = (
    # software
    Kind(
        "python-version",
        "Python",
        "this Python is older than the versions that Shoal supports",
        "install Python 3.11 or newer, and Shoal in a new virtual environment",
    ),
    Kind(
        "torch",
        "PyTorch",
        "PyTorch is missing, or cannot be loaded, so that no rank can start",
        "pip install --force-reinstall torch",
    ),
    Kind(
        "torch-build",
        "PyTorch's build",
        "this host has GPUs, but the installed PyTorch was built for CPUs",
        "install a build for your GPUs: pip install --force-reinstall torch "
        "--index-url https://download.pytorch.org/whl/cu128 (ROCm: .../whl/rocm6.4)",
    ),
    Kind(
        "torch-devices",
        "GPUs in PyTorch",
        "the driver shows GPUs that PyTorch cannot use: the driver is usually older than PyTorch's CUDA",
        "update the driver, or install a PyTorch for the CUDA version that nvidia-smi shows",
    ),
    # devices
    Kind(
        "devices",
        "Devices",
        "the tool of the vendor reports an error, so the GPUs cannot be used",
        "run nvidia-smi (or rocm-smi); after an update of the driver, reboot or reload its kernel modules; in a "
        "container, start it with --gpus all",
    ),
    Kind(
        "visible-devices",
        "CUDA_VISIBLE_DEVICES",
        "the variable hides all GPUs, or names one that does not exist: that entry and all after it are ignored",
        "unset CUDA_VISIBLE_DEVICES, or name GPUs that nvidia-smi -L lists, each once",
    ),
    Kind(
        "device-order",
        "Order of GPUs",
        "the GPUs differ, and CUDA numbers them by speed, so that its number 0 may not be number 0 of nvidia-smi",
        "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
    ),
    Kind(
        "device-memory",
        "Memory of GPUs",
        "other processes hold memory of the GPUs, which the KV cache cannot have",
        "nvidia-smi shows the processes: end them, or lower --gpu-memory-utilization",
    ),
    # cores and memory
    Kind(
        "cores",
        "Cores",
        "this process may use fewer cores than the machine has, because of a CPU quota or its affinity",
        "raise the CPU limit of the container (docker run --cpus, Kubernetes resources.limits.cpu), or taskset",
    ),
    Kind(
        "memory",
        "Memory",
        "little memory is available, or a control group allows less than the machine has",
        "end other programs, or raise the limit of the container (docker run --memory, resources.limits.memory)",
    ),
    Kind(
        "numa",
        "NUMA",
        "the memory of some cores' own NUMA node cannot be used, so that they read from a distant one",
        "give the container whole NUMA nodes: docker run --cpuset-cpus and --cpuset-mems for the same nodes",
    ),
    # limits
    Kind(
        "shared-memory",
        "/dev/shm",
        "/dev/shm is missing or small: NCCL exchanges tensors through it if GPUs have no direct way, and fails with "
        "'unhandled system error' or a bus error if it is full",
        "docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory at /dev/shm; else "
        "mount -o remount,size=8g /dev/shm",
    ),
    Kind(
        "open-files",
        "Open files",
        "few files may be open: each connection of a client and each process of Shoal needs some",
        "ulimit -Hn 65536 as root, LimitNOFILE=65536 in a unit of systemd, or docker run --ulimit nofile=65536",
    ),
    Kind(
        "processes",
        "Processes and threads",
        "few processes and threads may be started: PyTorch starts a thread for each core of each rank",
        "ulimit -u 65536, or raise the limit of the container (docker run --pids-limit)",
    ),
    Kind(
        "locked-memory",
        "Locked memory",
        "RDMA must lock memory, and this process may lock little: NCCL fails with 'ibv_reg_mr failed' or falls back",
        "docker run --ulimit memlock=-1, LimitMEMLOCK=infinity in a unit of systemd, or ulimit -l unlimited",
    ),
    # ports and addresses
    Kind(
        "loopback",
        "Own connections",
        "this host cannot connect to itself at this address: a firewall or a sandbox is in the way",
        "allow connections between processes of this host (iptables -L, nft list ruleset), and bring up lo",
    ),
    Kind(
        "port",
        "Port",
        "another program listens at the port where the hosts should meet",
        "ss -ltnp shows the program: end it, or give another --master-port on all hosts",
    ),
    Kind(
        "master-address",
        "Address of the first host",
        "--master-addr is no address of the host with --node-rank 0, or only that host can reach it",
        "give an address that `ip address` shows on the host with --node-rank 0, the same on all hosts",
    ),
    Kind(
        "host-name",
        "Name of this host",
        "the name of this host is unknown, or stands for a loopback address, which other hosts cannot reach",
        "give addresses instead of names, or correct the name in /etc/hosts",
    ),
    # links
    Kind(
        "device-links",
        "Links between GPUs",
        "some GPUs reach each other only over PCIe or over the other processor: tensor parallelism is slow there",
        "put tensor-parallel ranks on GPUs with NVLink or Infinity Fabric by CUDA_VISIBLE_DEVICES, and use pipeline "
        "parallelism between the others",
    ),
    Kind(
        "link-down",
        "NVLink",
        "links of a GPU are inactive, or GPUs have different numbers of active links",
        "nvidia-smi nvlink --status; reset the GPU (nvidia-smi --gpu-reset), else have the hardware checked",
    ),
    Kind(
        "fabric",
        "NVSwitch",
        "the fabric manager has not set up the NVSwitches: CUDA fails with error 802, 'system not yet initialized'",
        "systemctl start nvidia-fabricmanager, in the version of the driver",
    ),
    Kind(
        "pcie",
        "PCIe",
        "a GPU uses fewer lanes than it has: it is in a slow slot or not seated well",
        "nvidia-smi -q -d PERFORMANCE and lspci -vv show the link; move or reseat the card, check the BIOS",
    ),
    # network
    Kind(
        "interfaces",
        "Network interfaces",
        "no interface that reaches other hosts is up",
        "ip link set NAME up, and give it an address; a container needs --network host",
    ),
    Kind(
        "chosen-interface",
        "Chosen interface",
        "connections to other hosts would use a slow or a virtual interface",
        "give the address of the fast interface as --master-addr, and set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
    ),
    Kind(
        "host-address",
        "Address of this host",
        "SHOAL_HOST_IP or VLLM_HOST_IP is an address that this host does not have, or of an interface that is down",
        "unset it, or give one of the addresses that `ip address` shows",
    ),
    Kind(
        "interface-variables",
        "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
        "the variable names an interface that this host does not have or that is down",
        "unset it, or give a name that `ip link` shows",
    ),
    Kind(
        "rdma",
        "RDMA",
        "a port of an RDMA device is not active, or a variable turns RDMA off",
        "ibstat shows the ports: check cable and subnet manager; unset NCCL_IB_DISABLE",
    ),
    Kind(
        "variables",
        "Environment variables",
        "a variable is set that slows ranks down, or that Shoal does not know",
        "unset it, unless you know why it is set",
    ),
    Kind(
        "clock",
        "Clock",
        "the clock of this host is not synchronized, or is wrong: logs of several hosts cannot be compared",
        "timedatectl set-ntp true, or install chrony",
    ),
    # what was tried
    Kind(
        "all-reduce",
        "All-reduce",
        "ranks could not add their tensors, or the sums were wrong: no layout with several ranks can work",
        "the finding names the backend and its error; for NCCL also try NCCL_P2P_DISABLE=1 (virtual machines, ACS), "
        "then NCCL_SHM_DISABLE=1",
    ),
    Kind(
        "all-reduce-speed",
        "Speed of the all-reduce",
        "the ranks add their tensors much more slowly than is usual",
        "end other programs; look at the findings on cores, links and interfaces",
    ),
    Kind(
        "model",
        "Model",
        "the model cannot be read",
        "the finding says what is missing; shoal download MODEL fetches it",
    ),
    Kind(
        "model-fit",
        "Memory for the model",
        "the model fits on this host in no layout, or only in some",
        "use more devices or hosts, --dtype bfloat16, a smaller --max-model-len, or a smaller model",
    ),
    # several hosts
    Kind(
        "hosts",
        "Meeting of the hosts",
        "not all hosts have come, or one left before the end",
        "start shoal doctor on all hosts within --timeout, with the same --nnodes, --master-addr, --master-port and "
        "SHOAL_CLUSTER_KEY, and each with a --node-rank of its own; open the port in the firewall",
    ),
    Kind(
        "double-address",
        "Addresses of hosts",
        "two hosts have the same address, or two of the given hosts are the same machine",
        "give each host an address of its own (ip address), and run the doctor once on each",
    ),
    Kind(
        "versions",
        "Versions",
        "the hosts have different versions of Shoal, Python, PyTorch, NCCL, Ray or the driver",
        "install the same versions on all hosts, best from the same image",
    ),
    Kind(
        "variables-differ",
        "Variables of the hosts",
        "the hosts have different environment variables for communication",
        "set them alike on all hosts, or on none",
    ),
    Kind(
        "model-files",
        "Files of the model",
        "the hosts have different files of the model, or different options",
        "copy the model's folder anew, or download the same revision on all hosts",
    ),
    Kind(
        "devices-differ",
        "Devices of the hosts",
        "the hosts have different devices: the slowest one sets the pace, and the smallest one the KV cache",
        "use equal hosts for one model, or give each its own layout",
    ),
    Kind(
        "clock-skew",
        "Clocks of the hosts",
        "the clocks of the hosts differ",
        "timedatectl set-ntp true on all hosts, or install chrony",
    ),
    Kind(
        "connection",
        "Connections between hosts",
        "one host cannot connect to another on a port that the operating system chooses",
        "allow all ports between the hosts of the cluster in the firewall or the security group",
    ),
    Kind(
        "slow-pair",
        "Slowest connection",
        "the connection between two hosts is much slower than the others, or than its interface",
        "check cable, switch port, MTU (ip link) and the chosen interface of both hosts",
    ),
    Kind(
        "mtu",
        "MTU",
        "the interfaces over which the hosts reach each other have different MTUs: large packets get lost or are cut",
        "ip link set NAME mtu N, with the same N on all hosts and switches",
    ),
    Kind(
        "transport",
        "Way between hosts",
        "NCCL sends over plain sockets although there are RDMA devices, or without GPUDirect RDMA",
        "unset NCCL_IB_DISABLE, set NCCL_IB_HCA to the active device; GPUDirect: modprobe nvidia_peermem; a container "
        "needs --device /dev/infiniband and --ulimit memlock=-1",
    ),
    # the doctor itself
    # Ray
    Kind(
        "ray-nodes",
        "Nodes of Ray",
        "a node of the Ray cluster is dead, or the doctor could not run there",
        "ray start --address HOST:PORT on that host again; pip install the same version of Shoal in the environment "
        "where Ray runs",
    ),
    Kind(
        "ray-address",
        "Address in Ray",
        "Ray knows a node by another address than the one that ranks use: their traffic may take a slower interface",
        "ray start --node-ip-address ADDRESS with the address of the fast interface, or set SHOAL_HOST_IP on that host",
    ),
    Kind(
        "ray-resources",
        "Resources in Ray",
        "Ray counts other devices than the host has: ranks come where none is free for them, or devices stay idle",
        "ray stop, then ray start without --num-gpus and --num-cpus, or with the right numbers",
    ),
    Kind(
        "check-failed",
        "Checks that were not made",
        "a check could not be made, so nothing is known about its subject",
        "the finding says why; run the doctor again with more rights, or with a greater --timeout",
    ),
)

KINDS: dict[str, Kind] = {row.id: row for row in _ROWS}


def finding(kind: str, level: Level, text: str, mend: str | None = None) -> Finding:
    """Return a finding. `mend`: what mends it, if the table's text is not exact enough."""
    known = KINDS[kind].mend
    return Finding(kind=kind, level=level, text=text, mend="" if level == "ok" else known if mend is None else mend)


def ok(kind: str, text: str) -> Finding:
    return finding(kind, "ok", text)


def warning(kind: str, text: str, mend: str | None = None) -> Finding:
    return finding(kind, "warning", text, mend)


def failure(kind: str, text: str, mend: str | None = None) -> Finding:
    return finding(kind, "failure", text, mend)
