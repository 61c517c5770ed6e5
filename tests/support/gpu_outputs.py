"""What the tools of vendors print on hosts with GPUs, in the form that they really have."""

_UUID_END = "-0000-0000-0000-000000000000"
DGX_QUERY = "".join(
    f"{index}, GPU-{index:08x}{_UUID_END}, NVIDIA H100 80GB HBM3, 00000000:{bus}:00.0, 81559, 4, 550.54.15\n"
    for index, bus in enumerate(("1B", "43", "52", "61", "9D", "C3", "D1", "DF"))
)

_NICS = ("NIC0", "NIC1")


def _matrix(ways: list[list[str]], affinity: list[tuple[str, str]], nics: list[list[str]]) -> str:
    count = len(ways)
    names = [f"GPU{index}" for index in range(count)]
    head = ["", *names, *_NICS[: len(nics[0]) if nics else 0], "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"]
    rows = ["\x1b[4m" + "\t".join(head) + "\x1b[0m"]
    for index in range(count):
        cells = [" X " if other == index else ways[index][other] for other in range(count)]
        cores, node = affinity[index]
        rows.append("\t".join([names[index], *cells, *(nics[index] if nics else []), cores, node, "\tN/A"]))
    for number in range(len(nics[0]) if nics else 0):
        cells = [nics[index][number] for index in range(count)]
        others = [" X " if other == number else "SYS" for other in range(len(nics[0]))]
        rows.append("\t".join([_NICS[number], *cells, *others, "\t\t"]))
    return "\n".join(rows) + _LEGEND


_LEGEND = """

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges within a NUMA node
  PHB  = Connection traversing PCIe as well as a PCIe Host Bridge (typically the CPU)
  PXB  = Connection traversing multiple PCIe bridges (without traversing the PCIe Host Bridge)
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""

# Eight GPUs behind NVSwitches: every pair has all 18 links.
DGX_TOPOLOGY = _matrix(
    [["NV18"] * 8 for _ in range(8)],
    [("0-55,112-167", "0")] * 4 + [("56-111,168-223", "1")] * 4,
    [["PIX", "SYS"]] * 4 + [["SYS", "PIX"]] * 4,
)
DGX_NVLINKS = "".join(
    f"GPU {index}: NVIDIA H100 80GB HBM3 (UUID: GPU-{index:08x}-0000-0000-0000-000000000000)\n"
    + "".join(f"\t Link {link}: 26.562 GB/s\n" for link in range(18))
    for index in range(8)
)

# Four GPUs with bridges between two and two, and the processors between the pairs.
BRIDGED_TOPOLOGY = _matrix(
    [["X", "NV4", "SYS", "SYS"], ["NV4", "X", "SYS", "SYS"], ["SYS", "SYS", "X", "NV4"], ["SYS", "SYS", "NV4", "X"]],
    [("0-15", "0"), ("0-15", "0"), ("16-31", "1"), ("16-31", "1")],
    [],
)
BRIDGED_NVLINKS = "".join(
    f"GPU {index}: NVIDIA RTX A6000 (UUID: GPU-{index:08x})\n"
    + "".join(f"\t Link {link}: {'14.062 GB/s' if (index, link) != (3, 3) else '<inactive>'}\n" for link in range(4))
    for index in range(4)
)

# Two cards of a workstation, without NVLink: the second command of the doctor prints nothing.
WORKSTATION_TOPOLOGY = _matrix([["X", "PHB"], ["PHB", "X"]], [("0-63", "0"), ("0-63", "0")], [])

FABRIC = """\
==============NVSMI LOG==============

Timestamp                                 : Wed Jun  5 10:00:00 2024
Driver Version                            : 550.54.15
CUDA Version                              : 12.4

Attached GPUs                             : 2
GPU 00000000:1B:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    Performance State                     : P0
    Fabric
        State                             : {first}
        Status                            : {status}
        CliqueId                          : 0
    Processes                             : None

GPU 00000000:43:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    Fabric
        State                             : Completed
        Status                            : Success
"""

ROCM_TOPOLOGY = """\
============================ ROCm System Management Interface ============================
================================ Weight between two GPUs =================================
       GPU0         GPU1         GPU2         GPU3
GPU0   0            15           15           15
GPU1   15           0            15           15
GPU2   15           15           0            15
GPU3   15           15           15           0

================================= Hops between two GPUs ==================================
       GPU0         GPU1         GPU2         GPU3
GPU0   0            1            1            1
GPU1   1            0            1            1
GPU2   1            1            0            1
GPU3   1            1            1            0

=============================== Link Type between two GPUs ===============================
       GPU0         GPU1         GPU2         GPU3
GPU0   0            XGMI         XGMI         XGMI
GPU1   XGMI         0            XGMI         XGMI
GPU2   XGMI         XGMI         0            XGMI
GPU3   XGMI         XGMI         XGMI         0

======================================= Numa Nodes =======================================
GPU[0]\t\t: (Topology) Numa Node: 0
GPU[0]\t\t: (Topology) Numa Affinity: 0
GPU[1]\t\t: (Topology) Numa Node: 0
GPU[1]\t\t: (Topology) Numa Affinity: 0
================================== End of ROCm SMI Log ===================================
"""

ROCM_PCIE = ROCM_TOPOLOGY.replace("XGMI", "PCIE").replace("1            1 ", "2            2 ")

AMD_TOPOLOGY = """\
ACCESS TABLE:
             0000:c1:00.0 0000:c6:00.0 0000:c9:00.0
0000:c1:00.0 ENABLED      ENABLED      ENABLED
0000:c6:00.0 ENABLED      ENABLED      ENABLED
0000:c9:00.0 ENABLED      ENABLED      ENABLED

HOPS TABLE:
             0000:c1:00.0 0000:c6:00.0 0000:c9:00.0
0000:c1:00.0 0            1            3
0000:c6:00.0 1            0            3
0000:c9:00.0 3            3            0

LINK TYPE TABLE:
             0000:c1:00.0 0000:c6:00.0 0000:c9:00.0
0000:c1:00.0 SELF         XGMI         PCIE
0000:c6:00.0 XGMI         SELF         PCIE
0000:c9:00.0 PCIE         PCIE         SELF

"""

ROCM_QUERY = """{"card0": {"Unique ID": "0x7c2a1b", "PCI Bus": "0000:C1:00.0", "VRAM Total Memory (B)": "206141652992",
"VRAM Total Used Memory (B)": "297668608", "Card Series": "AMD Instinct MI300X", "Card Model": "0x74a1"},
"card1": {"Unique ID": "0x7c2a1c", "PCI Bus": "0000:C6:00.0", "VRAM Total Memory (B)": "206141652992",
"VRAM Total Used Memory (B)": "297668608", "Card Series": "AMD Instinct MI300X", "Card Model": "0x74a1"},
"system": {"Driver version": "6.7.0"}}"""
