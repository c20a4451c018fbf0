# How tokens choose, as checked by the Python layer.

cdef struct Rule:
    Py_ssize_t num_experts
    Py_ssize_t num_experts_per_tok
    bint is_sigmoid
    bint norm_topk_prob
    bint by_score           # choose by scores plus bias, rather than by logits
    Py_ssize_t n_group
    Py_ssize_t topk_group
    Py_ssize_t experts_per_group_score
    double routed_scaling_factor
