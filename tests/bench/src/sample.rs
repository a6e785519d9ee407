//! Samples taken in turns, and what they say.

use anyhow::Result;
use std::time::{Duration, Instant};

/// The times of several arms, block by block.
pub struct Samples {
    /// `blocks[block][arm]`, sorted.
    blocks: Vec<Vec<Vec<Duration>>>,
}

/// How often.
#[derive(Clone, Copy)]
pub struct Plan {
    pub blocks: usize,
    pub rounds: usize,
}

impl Samples {
    /// Calls the arms in turns, `plan.rounds` times a block, each round beginning with another
    /// arm, so that whatever disturbs the machine disturbs all of them alike.
    pub async fn take<A>(
        plan: Plan,
        arms: &mut [A],
        mut call: impl AsyncFnMut(&mut A, usize) -> Result<()>,
    ) -> Result<Self> {
        let mut blocks = Vec::new();
        for block in 0..plan.blocks {
            let mut times = vec![Vec::with_capacity(plan.rounds); arms.len()];
            for round in 0..plan.rounds {
                for turn in 0..arms.len() {
                    let arm = (round + turn) % arms.len();
                    let begin = Instant::now();
                    call(&mut arms[arm], block * plan.rounds + round).await?;
                    times[arm].push(begin.elapsed());
                }
            }
            times.iter_mut().for_each(|times| times.sort_unstable());
            blocks.push(times);
        }
        Ok(Self { blocks })
    }

    /// An arm's quantile, the median over the blocks.
    pub fn quantile(&self, arm: usize, quantile: f64) -> Duration {
        median(self.blocks.iter().map(|block| at(&block[arm], quantile)).collect())
    }

    /// The ratio of two arms' quantiles in the same block, the median over the blocks.
    pub fn ratio(&self, ours: usize, theirs: usize, quantile: f64) -> f64 {
        let ratio = |block: &Vec<Vec<Duration>>| {
            at(&block[ours], quantile).as_secs_f64() / at(&block[theirs], quantile).as_secs_f64()
        };
        let mut ratios: Vec<f64> = self.blocks.iter().map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    }
}

fn at(sorted: &[Duration], quantile: f64) -> Duration {
    sorted[((sorted.len() as f64 * quantile) as usize).min(sorted.len() - 1)]
}

/// The middle one.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    at(&times, 0.5)
}

/// `ours / theirs`.
pub fn ratio(ours: Duration, theirs: Duration) -> f64 {
    ours.as_secs_f64() / theirs.as_secs_f64()
}
