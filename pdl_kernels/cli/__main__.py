from pdl_kernels.cli import main

main()
