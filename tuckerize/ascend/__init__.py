"""Everything that knows Ascend: torch_npu, CANN, HCCL and the product generations."""
