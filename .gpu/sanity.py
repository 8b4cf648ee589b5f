import sys, time; sys.path[:0]=['.','tests']
import torch, dsv4
print(torch.__version__, torch.cuda.get_device_name())
torch.backends.cuda.matmul.allow_tf32=False
ids=[0]+[5+i*7%300 for i in range(399)]
for numerics in ("exact","trained"):
    c=dsv4.load("models/tiny",numerics=numerics,max_context=512,mtp=True)
    for dt in ("float32","bfloat16"):
        g=dsv4.load("models/tiny",device="cuda",numerics=numerics,dtype=dt,max_context=512,mtp=True)
        a,b=c.logits(ids),g.logits(ids)
        kl=(a.softmax(-1)*(a.log_softmax(-1)-b.log_softmax(-1))).sum(-1)
        print(numerics,dt,"max",float((a-b).abs().max()),"median of row max",float((a-b).abs().amax(-1).median()),"kl",float(kl.mean()), "top1",float((a.argmax(-1)==b.argmax(-1)).float().mean()))
        print("draft",float((c.draft_logits(ids)-g.draft_logits(ids)).abs().median()))
g=dsv4.load("models/tiny",device="cuda",weights="nvfp4",activations="nvfp4",max_context=512)
t=g.generate(ids[:50],64); list(t); t=g.generate(ids[:50],64,dsv4.Sampling(1.0,seed=1)); list(t); print(t.timings, t.timings.decode_tps, t.finish)
