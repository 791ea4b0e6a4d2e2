//! Routers that POST keys: as many as the broker answers on connections that stay, or so many in a given time, each on
//! a connection of its own.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};
use wgkex_tests::http::ask;
use wgkex_tests::swarm;

use crate::gateway::key;

/// How long a router waits for its answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of the POSTs.
#[derive(Debug, Default)]
pub struct Answers {
    /// Those answered with 200.
    pub good: u32,
    /// All others.
    pub bad: u32,
    /// How long each of the answers took that came.
    pub times: Vec<Duration>,
}

/// Where a router asks, and for which domain.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The broker.
    pub server: SocketAddr,
    /// The path.
    pub path: &'static str,
    /// The domain.
    pub domain: &'static str,
}

/// POSTs one new key after the other on each of so many connections for `time`.
pub fn closed(target: Target, connections: u32, time: Duration) -> Answers {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (end, number) = (Instant::now() + time, Arc::new(AtomicU32::new(0)));
        let mut routers = JoinSet::new();
        for _ in 0..connections {
            let number = number.clone();
            routers.spawn(async move {
                let mut answers = Answers::default();
                let mut stream = connect(target.server).await.expect("the server listens");
                while Instant::now() < end {
                    let status = post(&mut stream, target, number.fetch_add(1, Ordering::Relaxed)).await;
                    answers.count(status.expect("a connection that stays"));
                }
                answers
            });
        }
        let mut all = Answers::default();
        while let Some(answers) = routers.join_next().await {
            let answers = answers.expect("a router that ends well");
            all.good += answers.good;
            all.bad += answers.bad;
        }
        all
    })
}

/// POSTs `keys`, evenly spread over `time`, each on a new connection.
pub fn open(target: Target, keys: Range<u32>, time: Duration) -> Answers {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (began, gap) = (tokio::time::Instant::now(), time / u32::try_from(keys.len()).unwrap_or(1));
        let mut routers = JoinSet::new();
        for (number, turn) in keys.zip(0..) {
            sleep_until(began + gap * turn).await;
            routers.spawn(async move {
                let began = Instant::now();
                let answer = async { post(&mut connect(target.server).await?, target, number).await };
                (timeout(PATIENCE, answer).await, began.elapsed())
            });
        }
        let mut all = Answers::default();
        while let Some(answer) = routers.join_next().await {
            match answer.expect("a router that ends well") {
                (Ok(Ok(status)), time) => {
                    all.count(status);
                    all.times.push(time);
                }
                _ => all.bad += 1,
            }
        }
        all
    })
}

impl Answers {
    fn count(&mut self, status: u16) {
        *if status == 200 { &mut self.good } else { &mut self.bad } += 1;
    }
}

async fn connect(server: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// POSTs a key; returns the status when the answer is read.
async fn post(stream: &mut TcpStream, target: Target, number: u32) -> std::io::Result<u16> {
    swarm::post(stream, target.path, "", &ask(target.domain, &key(number).to_string())).await
}
