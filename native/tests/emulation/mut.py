import sys,os,shutil,subprocess,re
N='../../src/cuda/'
which=sys.argv[1]; only=sys.argv[2:] 
G=[('h1 skipped held blocks','if ((!kWide || kSlots) && held) meet();','if (!kWide && held) meet();',0),
('h2 skipped streamed blocks','if (kSlots && !needed) meet();','',0),
('h3 tail of the producer','ptx::barrier_wait(empty(stage), phase ^ 1);\n        step_stage();','',0),
('g1 release the current stage, one early','ptx::wgmma_wait<1>();\n          release(before_stage());','ptx::wgmma_wait<1>();\n          release(stage);',0),
('g1b wait<0> before release of the last and one stage early', 'ptx::wgmma_wait<1>();\n          release','ptx::wgmma_wait<2>();\n          release',0),
('g2 last wait dropped','      ptx::wgmma_wait<0>();\n      release(before_stage());','      release(before_stage());',0),
('g3 wrong phase of columns','ptx::barrier_wait(columns_full, step & 1);','ptx::barrier_wait(columns_full, step & 1 ^ 1);',0),
('g4 staged part overwritten before it left','          if (part >= C::kHeld) store_part(part - C::kHeld);\n          stage_part(part, bits);','          stage_part(part, bits);\n          if (part >= C::kHeld) store_part(part - C::kHeld);',0),
('g5 no meeting before the ranks are released','if ((!kWide || kSlots) && held) meet();','',0),
('g6 columns_empty not waited for','ptx::barrier_wait(columns_empty, step & 1 ^ 1);','',0),
('g7 residual released without meeting','          meet();  // ldmatrix of all warps is done\n          release(from);','          release(from);',0),
('g8 work entry phase','ptx::barrier_wait(work_empty(step), (step / 2 & 1) ^ 1);','',0),
('g9 q before the primaries','      wait_for_primaries();\n      stage = 0;','      stage = 0;',0),
('g10 empty of the residual stages not waited for','            ptx::barrier_wait(empty(stage), phase ^ 1);\n            ptx::barrier_expect_bytes(full(stage), boxes','            ptx::barrier_expect_bytes(full(stage), boxes',0),
('g11 low-rank wait dropped','            ptx::wgmma_commit();\n            ptx::wgmma_wait<0>();','            ptx::wgmma_commit();',0),
('g12 other row by exclusive or','const int other_row = rank ? tile.row - C::kBlockM : tile.row + C::kBlockM;','const int other_row = tile.row;',0),
('g13 store part bounds','if (row + i * 4 < p.args.m && column < out.n','if (row < p.args.m && column < out.n',0),
]
P=[('p1 stage released one tile early','if (tile % 4 == 3) leave_stage(left);','if (tile % 4 == 2) leave_stage(left);',1),
('p2 wait<1> dropped','          ptx::wgmma_wait<1>();\n','',1),
('p3 fragments loaded before the wait','          ptx::wgmma_wait<1>();\n          if (tile % 4 == 3) leave_stage(left);\n          if (tile + 2 < tiles) load_a(next, 2 * tile + 4);','          if (tile + 2 < tiles) load_a(next, 2 * tile + 4);\n          ptx::wgmma_wait<1>();\n          if (tile % 4 == 3) leave_stage(left);',1),
('p4 last wait dropped','          ptx::wgmma_wait<0>();\n          leave_stage(left);','          leave_stage(left);',1),
('p5 sums_free phase','ptx::barrier_wait(sums_free, turn & 1 ^ 1);\n          uint32_t','\n          uint32_t',1),
('p6 batch before not asked for','    if (batch > 0 && stage == stages - batch_stages)','    if (0)',1),
('p7 powers not waited for','        ptx::barrier_wait(barrier(shared.powers_full[batch % kPowers]), batch / kPowers & 1);','',1),
('p8 maxima phase','ptx::barrier_wait(maxima_full, turn / 2 & 1);','ptx::barrier_wait(maxima_full, turn & 1);',1),
('p9 a_full not waited for','if (plan.a_resident && steps) ptx::barrier_wait(barrier(shared.a_full), 0);','',1),
('p10 registers: odd for even','            end_tile(a_odd, tile);','            end_tile(a_even, tile);',1),
('p11 tail not waited for','    if (turn) ptx::barrier_wait(sums_free, turn & 1 ^ 1);  // the','    // the',1),
]
for name,a,b,prep in (G if which=='g' else P):
    if only and name.split()[0] not in only: continue
    f='prepare_sm90.cu' if prep else 'gemm_sm90.cu'
    d=os.path.abspath('src_')+which; shutil.rmtree(d,ignore_errors=True); os.makedirs(d)
    for x in os.listdir(N):
        if x.endswith(('.cu','.cuh','.h')): shutil.copy(N+x,d)
    s=open(d+'/'+f).read()
    if a not in s: print(name,': TEXT MISSING'); continue
    s=s.replace(a,b); open(d+'/'+f,'w').write(s)
    if prep:
        subprocess.run(['bash','b.sh',d,'mut'],cwd='prepare'); seen='NOT SEEN'
        r=subprocess.run('FIRST=1 timeout 100 ./mut 1 60 2>&1 | grep -E "FAULT|FAIL" | head -1',shell=True,cwd='prepare',capture_output=True,text=True).stdout
    else:
        subprocess.run(['bash','b.sh',d,'mut',os.environ.get('T','3')],cwd='gemm')
        r=subprocess.run('FIRST=1 timeout 100 ./mut '+os.environ.get('ARGS','1')+' 2>&1 | grep -E "FAULT|FAIL" | head -1',shell=True,cwd='gemm',capture_output=True,text=True).stdout
    print(name,':',r.strip() or 'NOT SEEN',flush=True)
