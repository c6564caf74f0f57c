	s_and_b32 s13, s13, 0xffff
	v_lshl_add_u32 v0, s1, 15, v0
	v_lshl_or_b32 v1, v2, 2, s0
	v_bfrev_b32_e32 v2, 1
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 368 39                        ; cross_entropy.py:368:39
	v_add_u32_e32 v3, s7, v1
	v_cmp_gt_i32_e32 vcc, s10, v3
	.loc	1 365 5                         ; cross_entropy.py:365:5
	s_addk_i32 s7, 0x800
	s_cmp_ge_i32 s7, s10
.Ltmp20:
	.loc	1 347 9                         ; cross_entropy.py:347:9 @[ cross_entropy.py:368:13 ]
	v_cndmask_b32_e32 v3, v2, v0, vcc
	buffer_load_dwordx4 v[4:7], v3, s[12:15], 0 offen
.Ltmp21:
	.loc	1 365 5                         ; cross_entropy.py:365:5
	v_add_u32_e32 v0, 0x2000, v0
.Ltmp22:
	.loc	1 349 36                        ; cross_entropy.py:349:36 @[ cross_entropy.py:368:13 ]
	s_waitcnt vmcnt(0)
	v_pk_mul_f32 v[8:9], s[18:19], v[4:5]
	.loc	1 349 12 is_stmt 0              ; cross_entropy.py:349:12 @[ cross_entropy.py:368:13 ]
	v_cmp_neq_f32_e32 vcc, 0, v4
	.loc	1 349 36                        ; cross_entropy.py:349:36 @[ cross_entropy.py:368:13 ]
	v_pk_mul_f32 v[10:11], s[18:19], v[6:7]
	.loc	1 349 12                        ; cross_entropy.py:349:12 @[ cross_entropy.py:368:13 ]
	v_cmp_neq_f32_e64 s[0:1], 0, v7
	v_cmp_neq_f32_e64 s[2:3], 0, v6
	v_cmp_neq_f32_e64 s[4:5], 0, v5
	v_cndmask_b32_e32 v4, 0, v8, vcc
	v_cndmask_b32_e64 v7, 0, v11, s[0:1]
	v_cndmask_b32_e64 v5, 0, v9, s[4:5]
	v_cndmask_b32_e64 v6, 0, v10, s[2:3]
.Ltmp23:
	.loc	1 369 9 is_stmt 1               ; cross_entropy.py:369:9
	buffer_store_dwordx4 v[4:7], v3, s[12:15], 0 offen
	.loc	1 365 5                         ; cross_entropy.py:365:5
	s_cbranch_scc0 .LBB0_3
.LBB0_4:                                ; %.loopexit
	.loc	1 358 9                         ; cross_entropy.py:358:9
	s_endpgm
.Ltmp24:
.Lfunc_end0:
