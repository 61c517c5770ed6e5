"""Logs in the form in which NCCL writes them with NCCL_DEBUG=INFO, on several kinds of clusters."""

SOCKETS = """\
node1:55933:55933 [0] NCCL INFO Bootstrap : Using eth0:172.17.0.3<0>
node1:55933:55933 [0] NCCL INFO NET/Plugin: No plugin found (libnccl-net.so)
node1:55933:55933 [0] NCCL INFO cudaDriverVersion 12040
NCCL version 2.20.5+cuda12.4
node1:55933:56010 [0] NCCL INFO NET/IB : No device found.
node1:55933:56010 [0] NCCL INFO NET/Socket : Using [0]eth0:172.17.0.3<0> [1]eth1:10.0.0.3<0>
node1:55933:56010 [0] NCCL INFO Using non-device net plugin version 0
node1:55933:56010 [0] NCCL INFO Using network Socket
node1:55933:56010 [0] NCCL INFO Channel 00/02 :    0   1
node1:55933:56010 [0] NCCL INFO Trees [0] 1/-1/-1->0->-1 [1] -1/-1/-1->0->1
node1:55933:56010 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
node1:55933:56010 [0] NCCL INFO Channel 01/0 : 1[0] -> 0[0] [receive] via NET/Socket/1
node1:55933:56010 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
node1:55933:56010 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[0] [send] via NET/Socket/1
node1:55933:56010 [0] NCCL INFO Connected all rings
"""

ROCE_WITHOUT_GPUDIRECT = """\
hostname1:25668:27396 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB primaryip:10.10.10.10<0>
hostname1:25668:27396 [0] NCCL INFO Using non-device net plugin version 0
hostname1:25668:27396 [0] NCCL INFO Using network IB
hostname1:25668:27396 [0] NCCL INFO comm 0x55cc8aa86c70 rank 0 nranks 2 cudaDev 0 nvmlDev 0 busId 1c000 - Init START
hostname1:25668:27396 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0'
hostname1:25668:27396 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 1 'mlx5_1'
hostname1:25668:27396 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/IB/0
hostname1:25668:27396 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0
hostname1:25668:27396 [0] NCCL INFO Connected all rings
"""

GPUDIRECT = """\
H20-GPU-05:1789225:1789736 [1] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_3:1/IB [RO]; OOB bond0:10.1.2.3<0>
H20-GPU-05:1789225:1789736 [1] NCCL INFO Using network IB
H20-GPU-06:4015539:4015652 [0] NCCL INFO Channel 07/0 : 0[0] -> 2[0] [receive] via NET/IB/3/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 00/0 : 1[1] -> 3[1] [receive] via NET/IB/2/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 01/0 : 3[1] -> 1[1] [send] via NET/IB/2/GDRDMA(PCI)
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 00/0 : 3[1] -> 2[0] via P2P/CUMEM
H20-GPU-05:1789225:1789736 [1] NCCL INFO Channel 01/0 : 1[1] -> 0[0] via P2P/CUMEM/read
"""

EFA = """\
algo-1:18063:18138 [6] NCCL INFO NET/OFI Global registrations supported
algo-1:18063:18138 [6] NCCL INFO Using network AWS Libfabric
algo-1:18063:18138 [6] NCCL INFO Channel 03/0 : 14[6] -> 6[6] [receive] via NET/AWS Libfabric/3/GDRDMA
algo-1:18057:18130 [0] NCCL INFO Channel 07/0 : 0[0] -> 1[1] via P2P/CUMEM/read
"""

PLUGIN = """\
hostname-test:981:1267 [1] NCCL INFO Using network IBext_v8
hostname-test:981:1267 [1] NCCL INFO Channel 01/0 : 26[2] -> 33[1] [receive] via NET/IBext_v8/4
"""

ONE_HOST = """\
user:169127:169179 [2] NCCL INFO Channel 00/0 : 10[51000] -> 11[57000] via P2P/IPC/read
axa:3048391:3048566 [0] NCCL INFO Channel 01/0 : 1[21000] -> 0[1000] via P2P/direct pointer
ubuntu:9621:9692 [7] NCCL INFO Channel 00 : 15[7] -> 14[6] via SHM/direct/direct
"""

OLD = """\
gpu2-ru7:2144:2556 [2] NCCL INFO Ring 00 : 2[3d000] -> 3[3e000] via direct shared memory
gpu2-ru7:2143:2561 [1] include/shm.h:28 NCCL WARN Call to posix_fallocate failed : No space left on device
gpu2-ru7:2143:2561 [1] NCCL INFO include/shm.h:41 -> 2
"""

DISABLED = """\
axa:3048391:3048566 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.
axa:3048391:3048566 [0] NCCL INFO NCCL_SOCKET_IFNAME set by environment to lo
axa:3048391:3048566 [0] NCCL INFO NET/Socket : Using [0]lo:127.0.0.1<0>
axa:3048391:3048566 [0] NCCL INFO Using network Socket
axa:3048391:3048566 [0] NCCL INFO NET/Socket : GPU Direct RDMA Disabled for HCA 0 'lo'
"""
