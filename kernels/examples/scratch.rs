//! scratch
#![allow(missing_docs, clippy::unwrap_used)]
use std::hint::black_box;
use thermocline_kernels::*;
fn cpu() -> f64 { let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime); t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9 }
fn main() {
    let cols: usize = std::env::args().nth(1).map_or(576, |a| a.parse().unwrap());
    let k = Kernels::detect();
    for e in Encoding::ALL {
        let stride = e.row_stride(cols);
        for mb in [1usize, 200] {
            let n = ((mb << 20) / 2 / stride) & !3;
            let row: Vec<f32> = (0..cols).map(|j| ((j * 31 % 97) as f32 - 48.0) / 100.0).collect();
            let mut p = vec![0; stride]; pack(e, &row, None, &mut p).unwrap();
            let data = p.repeat(n);
            let w = MatrixRef { encoding: e, rows: n, columns: cols, data: &data };
            let x = vec![0.5; cols];
            let reps = (400 / mb).max(2) * 2;
            let mut best = [f64::INFINITY; 6];
            for _ in 0..6 {
                for v in 0..6 {
                    let t = cpu();
                    let mut s = 0.0; let mut y = vec![0.0f32; cols];
                    for _ in 0..reps {
                        match v {
                            0 => for r in (0..n).step_by(4) { let d = k.dots(e, [w.row(r), w.row(r+1), w.row(r+2), w.row(r+3)], &x); s += d[0] + d[3]; },
                            1 => for r in (0..n).step_by(2) { let d = k.dots(e, [w.row(r), w.row(r+1)], &x); s += d[0]; },
                            2 => for r in 0..n { let d = k.dots(e, [w.row(r)], &x); s += d[0]; },
                            4 => for r in (0..n).step_by(4) { let a = ((r + 4) * stride + 2048).min(data.len()); prefetch(&data[a..(a + 4 * stride).min(data.len())]); let d = k.dots(e, [w.row(r), w.row(r+1), w.row(r+2), w.row(r+3)], &x); s += d[0] + d[3]; },
                            5 => for r in (0..n).step_by(2) { let a = ((r + 2) * stride + 3072).min(data.len()); prefetch(&data[a..(a + 2 * stride).min(data.len())]);let d = k.dots(e, [w.row(r), w.row(r+1)], &x); s += d[0]; },
                            _ => for r in 0..n { k.axpy(e, w.row(r), 0.5, black_box(&mut y)); },
                        }
                    }
                    black_box(s);
                    best[v] = best[v].min((cpu() - t) / reps as f64);
                }
            }
            let gb = (n * stride) as f64 / 1e9;
            println!("{e} cols {cols} {mb} MB: dots4 {:.1} dots2 {:.1} dots1 {:.1} axpy {:.1} dots4pf {:.1} dots2pf {:.1} GB/s", gb/best[0], gb/best[1], gb/best[2], gb/best[3], gb/best[4], gb/best[5]);
        }
    }
}
