"""What the compiler made of every kernel, read from the machine code on a machine without a GPU.

    python -m benchmarks.roofline [--quick] [--target sm_90] [--kernel loss_rows] [--json FILE.json]

    cases.py     which calls of the package's launches are looked at
    compile.py   the package's own launches, so that they compile and launch nothing
    machine.py   machine code -> instructions, loops, memory accesses
    walks.py     which loops of a kernel walk over logits, and what one element costs there
    hardware.py  data sheets
    model.py     data sheet and machine code -> programs in flight, which unit binds, fraction of the memory limit
    measure.py   one launch as a row of the report
    budgets.py   what fails the run
    report.py    table and JSON

A new kernel needs a call in cases.py that reaches it and, if it walks over logits, an entry in walks.KERNEL_WALKS.
Registers, spills, widths and instruction counts are facts about one compiler version. The binding unit and the
predicted fraction are a model, not a measurement.
"""
