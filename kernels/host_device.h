// SYNCBN_HOST_DEVICE marks functions that nvcc compiles for host and device, and other compilers for the host.

#ifndef SYNCBN_KERNELS_HOST_DEVICE_H_
#define SYNCBN_KERNELS_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define SYNCBN_HOST_DEVICE __host__ __device__
#else
#define SYNCBN_HOST_DEVICE
#endif

#endif  // SYNCBN_KERNELS_HOST_DEVICE_H_
