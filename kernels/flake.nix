{
  description = "Triton kernels for QLoRA: NF4 dequantise and matmul, LoRA linears, RMSNorm";

  inputs.kernel-builder.url = "github:huggingface/kernel-builder";

  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
