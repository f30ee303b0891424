"""The corpus and the training of the demo model. Not part of the wheel.

python -m yuan_grpc.demo.training train yuan_grpc/demo
"""
