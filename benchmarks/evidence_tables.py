"""Tables and a figure of what `benchmarks/evidence.py` has trained, with differences and how sure they are:

    python benchmarks/evidence_tables.py

reads results/evidence/rows.jsonl and writes README.md, evidence.png and evidence.svg beside it. All numbers come from the rows, and a test
makes them again. `--short` prints a table of the core settings for other pages.
"""
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np, pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parent))
from evidence import CEILING, CORE, NOISY, OURS, RIVALS, SCHEMES, SETTINGS, STATIC, TABLE_LR, TUNED, TUNED_EPOCHS, rate, read_rows
from fastai_l2rw.studies.tables import markdown, save_figure

PRESET = 'calibrated'
TRAININGS = {'pruned by cleanlab': 6, 'gold loss correction': 2} # the others take one

def wide_table(rows):
    "A row for each setting and seed, a column for each scheme, in the order in which they are known."
    df = pd.DataFrame([o for o in rows if o['lr'] == rate(o['setting'])])
    wide = df.pivot(index=['setting','seed'], columns='scheme', values='balanced_accuracy')
    order = sorted(wide.index, key=lambda o: (list(SETTINGS).index(o[0]), o[1]))
    return wide.reindex(columns=[o for o in SCHEMES if o in wide], index=order)

def spread(values):
    "Mean and standard deviation over the seeds."
    values = values.dropna()
    if not len(values): return ''
    return f'{values.mean():.1f} ± {values.std():.1f}' if len(values) > 1 else f'{values.mean():.1f}'

def best(seeds, schemes):
    "The scheme with the highest mean, of those that have all seeds that any has; None if there is none."
    seeds = seeds[[o for o in schemes if o in seeds]].dropna(axis=1, how='all')
    if not seeds.shape[1]: return None
    full = seeds.loc[:, seeds.count() == seeds.count().max()]
    return full.mean().idxmax()

def interval(differences):
    "Mean of paired differences and half of its 95 % confidence interval, by Student's t; NaN for fewer than two."
    d = differences.dropna()
    if len(d) < 2: return d.mean() if len(d) else np.nan, np.nan
    return d.mean(), student.ppf(0.975, len(d) - 1)*d.std()/np.sqrt(len(d))

def signed(differences):
    "The same as text."
    mean,half = interval(differences)
    if np.isnan(mean): return ''
    return f'{mean:+.1f}' if np.isnan(half) else f'{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})'

def verdict(differences):
    "Is the first ahead, behind, or neither, by more than the confidence interval?"
    mean,half = interval(differences)
    return '' if np.isnan(half) else 'ahead' if mean > half else 'behind' if mean < -half else 'level'

def conclusions(wide, preset=PRESET):
    "A row for each setting: names and numbers that the tables, the figure and the sentences are made of."
    found = {}
    for setting,seeds in wide.groupby(level=0, sort=False):
        seeds,row = seeds.droplevel(0),dict(seeds=seeds)
        row |= dict(n=int(seeds.count().max()), static=best(seeds, STATIC), rival=best(seeds, RIVALS))
        row['has'] = row['static'] is not None and preset in seeds and seeds[preset].notna().any()
        if row['has']:
            row['ahead'] = seeds[preset] - seeds[row['static']]
            row['verdict'] = verdict(row['ahead'])
            if row['rival'] is not None: row['of_rival'] = seeds[preset] - seeds[row['rival']]
            if CEILING in seeds and seeds[CEILING].notna().any():
                row['gap'] = (seeds[CEILING] - seeds[row['static']]).mean()
                row['closed'] = row['ahead'].mean()
        found[setting] = row
    return found

def share(rows):
    "The share of the gap that is closed, in %, of the settings together; None if there is no gap."
    rows = [o for o in rows if 'gap' in o]
    gap = sum(o['gap'] for o in rows)
    return 100*sum(o['closed'] for o in rows)/gap if gap > 0 else None

def main_table(found, settings, preset=PRESET):
    "What the first table shows."
    rows = {}
    for k in settings:
        if k not in found: continue
        o,cell = found[k],lambda name: spread(found[k]['seeds'][name]) if name in found[k]['seeds'] else ''
        named = lambda name: f'{cell(name)} ({name})' if name else ''
        closed = share([o])
        rows[k] = {'best static': named(o['static']), "the paper's method": cell('reweighted'),
            **{f"`'{name}'`": cell(name) for name in OURS if name != 'reweighted'}, 'best rival': named(o['rival']), CEILING: cell(CEILING),
            'gap closed, %': f'{closed:.0f}' if closed is not None and o['gap'] >= 1 else '',
            f"`'{preset}'` − best static (95 %)": signed(o['ahead']) if o['has'] else '',
            f"`'{preset}'` − best rival (95 %)": signed(o['of_rival']) if 'of_rival' in o else '', 'seeds': o['n']}
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('setting')

def short_table(found, settings=tuple(CORE)):
    "A table for other pages: its cells can be found in the rows, too."
    rows = {}
    for k in settings:
        if k not in found: continue
        seeds = found[k]['seeds']
        shown = {'best without trusted examples': found[k]['static'], "the paper's method": 'reweighted',
            **{f"`'{o}'`": o for o in OURS if o != 'reweighted'}, CEILING: CEILING}
        rows[k] = {title: spread(seeds[o]) if o in seeds else '' for title,o in shown.items()}
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('setting')

def cost_table(rows):
    "Seconds of the CPU relative to plain training of the same setting and seed, the median over these."
    df = pd.DataFrame([o for o in rows if o['lr'] == rate(o['setting'])])
    wide = df.pivot(index=['setting','seed'], columns='scheme', values='seconds')
    if 'unweighted' not in wide: return pd.DataFrame()
    relative = wide.div(wide['unweighted'], axis=0).median()
    names = [o for o in SCHEMES if o in relative and not np.isnan(relative[o])]
    return pd.DataFrame({'trainings': [TRAININGS.get(o, 1) for o in names],
        'time, plain training = 1': [f'{relative[o]:.1f}' for o in names],
        'seconds, median': [f'{wide[o].median():.1f}' for o in names]}, index=pd.Index(names, name='scheme'))

def rates_table(rows):
    "Mean balanced accuracy over the settings and seeds that a scheme was trained in at several learning rates."
    df = pd.DataFrame(rows)
    wide = df.pivot(index=['scheme','setting','seed'], columns='lr', values='balanced_accuracy')
    if wide.shape[1] < 2: return pd.DataFrame()
    wide = wide.dropna()
    means = wide.groupby(level=0).mean()
    means = means.reindex([o for o in SCHEMES if o in means.index])
    return means.map('{:.1f}'.format).rename(columns='rate {:g}'.format).assign(trainings=wide.groupby(level=0).size())

def sentences(found, preset=PRESET):
    "What there is to say, worst first."
    judged = {k: o for k,o in found.items() if o.get('verdict')}
    noisy = {k: o for k,o in judged.items() if k in NOISY}
    names = lambda verdict, of: [k for k,o in of.items() if o['verdict'] == verdict]
    told = lambda names: '; '.join(f'{k} ({found[k]["ahead"].mean():+.1f})' for k in names)
    behind,ahead,level = (names(o, judged) for o in ('behind','ahead','level'))
    first = f"`'{preset}'` is behind the best static scheme in {len(behind)} of {len(judged)} settings"
    first += f': {told(behind)}.' if behind else '.'
    closed,n = share(noisy.values()),len(ahead)
    second = f'It is ahead in {n}, and in {len(level)} there is no difference that the seeds show.'
    if closed is not None: second += (f' Where labels are wrong ({len(noisy)} settings), it closes {closed:.0f} % of the gap between '
        'the best static scheme and training on the right labels alone.')
    rival = [k for k,o in judged.items() if verdict(o.get('of_rival', pd.Series(dtype=float))) == 'behind']
    beaten = [k for k,o in judged.items() if verdict(o.get('of_rival', pd.Series(dtype=float))) == 'ahead']
    third = f'The best rival of each setting, chosen after the fact, is ahead of it in {len(rival)} settings and behind in {len(beaten)}.'
    return [first, second, third]

def figure(found, preset=PRESET):
    "A line for each setting, with a sign for each of five ways to train."
    settings = [k for k,o in found.items() if o['static'] is not None]
    kinds = {'best static': (lambda o: o['static'], dict(marker='s', color='#999999', ms=7)),
        "the paper's method": (lambda o: 'reweighted', dict(marker='o', mfc='none', mec='#0072B2', mew=1.6, ms=8)),
        'best rival': (lambda o: o['rival'], dict(marker='^', mfc='none', mec='black', mew=1.2, ms=8)),
        f'{preset} (this package)': (lambda o: preset, dict(marker='D', color='#E69F00', mec='black', mew=0.6, ms=7)),
        CEILING: (lambda o: CEILING, dict(marker='|', color='black', mew=2.5, ms=15))}
    fig = Figure(figsize=(8.5, 1.3 + 0.3*len(settings)), layout='constrained')
    ax = fig.subplots()
    for name,(which,style) in kinds.items():
        shown = [(i, found[k]['seeds'], which(found[k])) for i,k in enumerate(settings)]
        points = [(seeds[scheme].mean(), i) for i,seeds,scheme in shown if scheme in seeds and seeds[scheme].notna().any()]
        if points: ax.plot(*zip(*points), ls='', label=name, **style)
    for i,k in enumerate(settings):
        seeds = found[k]['seeds'] # the line goes from the best static scheme to what right labels alone give
        if CEILING in seeds and seeds[CEILING].notna().any():
            ax.plot([seeds[found[k]['static']].mean(), seeds[CEILING].mean()], [i, i], color='#bbbbbb', lw=1, zorder=0)
    ax.set_yticks(range(len(settings)), settings, fontsize='small')
    ax.invert_yaxis()
    ax.set_xlabel('balanced accuracy on test items, %, mean over the seeds')
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(axis='x', alpha=0.3)
    fig.legend(loc='outside upper center', ncols=5, frameon=False, fontsize='small')
    return fig

def report(rows, preset=PRESET):
    "The page as Markdown."
    wide = wide_table(rows)
    found = conclusions(wide, preset)
    everything = pd.DataFrame({k: {o: spread(found[k]['seeds'][o]) for o in wide} for k in found}).T.rename_axis('setting')
    commits = sorted({o['commit'] for o in rows})
    parts = ['# Evidence: which way to train', *sentences(found, preset), FIGURE, PROTOCOL, STATIC_SAYS,
        f'`python benchmarks/evidence.py cifar10.npz ham10000.npz diamonds.npz cifar10_blocks.npz ham10000_blocks.npz` made the [rows](rows.jsonl), `python benchmarks/evidence_tables.py` '
        f'this page. {len(rows)} trainings, of the commits {", ".join(commits)}.',
        '## The settings of the first table', markdown(main_table(found, CORE, preset))]
    more = [k for k in SETTINGS if k in found and k not in CORE | TUNED]
    if any(k in found for k in TUNED): parts += ['## Fine-tuning', TUNED_SAYS, markdown(main_table(found, TUNED, preset))]
    if more: parts += ['## More settings', markdown(main_table(found, more, preset))]
    parts += ['## All schemes', RIVALS_SAY, markdown(everything)]
    if len(cost := cost_table(rows)): parts += ['## What they cost', COST_SAYS, markdown(cost)]
    if len(rates := rates_table(rows)): parts += ['## Does the learning rate matter?', RATES_SAY, markdown(rates)]
    return '\n\n'.join(parts) + '\n'

FIGURE = ("![Balanced accuracy in each setting, of the best static scheme, the paper's method, the best rival, the preset, and right "
    'labels alone](evidence.png)')
PROTOCOL = ('A head with one hidden layer on features that a pretrained EfficientNet-Lite0 gives of the images; 15 epochs, batches of 64, '
    'the same learning rate for all (0.003, down half a cosine). Balanced accuracy on test items in %, mean ± standard deviation over the '
    'seeds: other trusted and training items, wrong labels, initial weights and batches. 10 trusted items of each class, unless it says '
    'otherwise. HAM10000 are 5,984 images at 160 pixels, one for each lesion; of CIFAR-10 there are 7,000 training and 2,000 test '
    'images at 96 pixels. *Diamonds* is a table of 8,000 rows, and the head is the whole network there; '
    f'it learns from scratch, with a rate of {TABLE_LR} for all, which was chosen on test items: the last table says why.')
TUNED_SAYS = (f"The last four blocks and the last convolution of the network are trained as well, by fastai's `fine_tune`: one epoch of the head alone, {TUNED_EPOCHS} of "
    'both, with Adam and a rate of 0.003. What comes before these blocks stays as it was pretrained, batch norm included.')
STATIC_SAYS = ('*Static* schemes take no trusted examples: ' + ', '.join(STATIC) + '. The best of them, and the best rival, are '
    'chosen by these means, setting by setting, of those that have all seeds. That is more than a user could do, and is in their favour. *Gap closed*: how far the '
    'preset comes on the way from the best static scheme to training on the right labels alone. Differences are paired by the seed, with '
    "their 95 % confidence interval by Student's t.")
RIVALS_SAY = ('Rivals are in [studies.rivals](../../nbs/37_studies.rivals.ipynb), with their sources. *Small losses* is told the share of '
    'wrong labels, which nobody else knows. *Trusted alone*, *pruned by cleanlab* and *right labels alone* repeat their items for the same '
    'number of steps; the last two weigh classes by inverse frequency.')
COST_SAYS = ('Seconds are those of one CPU core. In a network as small as this one, much of the time goes into Python and not into passes; '
    '[step_cost](../step_cost/step_cost.md) has networks that are larger.')
RATES_SAY = 'The mean over those settings and seeds that a scheme was trained in at all of these rates: those of the table.'

def main():
    parser = ArgumentParser(description='Write the tables and the figure of the rows.')
    parser.add_argument('--out', type=Path, default=Path('results/evidence'), help='folder with rows.jsonl')
    parser.add_argument('--preset', default=PRESET, help='the scheme that the differences are of')
    parser.add_argument('--short', action='store_true', help='print a table of the core settings for other pages, and write nothing')
    o = parser.parse_args()
    rows = list(read_rows(o.out/'rows.jsonl').values())
    if not rows: raise SystemExit(f'{o.out/"rows.jsonl"} has no rows: make them with benchmarks/evidence.py')
    found = conclusions(wide_table(rows), o.preset)
    if o.short: return print(markdown(short_table(found)))
    (o.out/'README.md').write_text(report(rows, o.preset), encoding='utf-8')
    save_figure(figure(found, o.preset), o.out/'evidence')

if __name__ == '__main__': main()
