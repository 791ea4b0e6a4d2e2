//! Routers that POST keys: as many as the broker answers on persistent connections, or so many in a given time, each on
//! a connection of its own.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use wgkex_tests::http::ask;
use wgkex_tests::many_routers;

use crate::gateway::key;

/// A router's timeout for its answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// The pause after which a router repeats a request without a 200, as routers' own scripts do; and how often it repeats
/// it.
const AGAIN: Duration = Duration::from_secs(60);
const TIMES: usize = 2;

/// The outcomes of the POSTs.
#[derive(Debug, Default)]
pub struct Answers {
    /// POSTs answered with 200.
    pub good: u32,
    /// POSTs answered with 200 when repeated.
    pub later: u32,
    /// All others.
    pub bad: u32,
    /// The time of each first answer.
    pub times: Vec<Duration>,
}

/// The broker, path and domain of a router's request.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The broker.
    pub server: SocketAddr,
    /// The path.
    pub path: &'static str,
    /// The domain.
    pub domain: &'static str,
}

/// POSTs new keys one after the other on each of so many connections for `time`.
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

/// POSTs `keys`, evenly spread over `time`, each on a new connection; refused routers repeat their request.
pub fn open(target: Target, keys: Range<u32>, time: Duration) -> Answers {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (began, gap) = (tokio::time::Instant::now(), time / u32::try_from(keys.len()).unwrap_or(1));
        let mut routers = JoinSet::new();
        for (number, turn) in keys.zip(0..) {
            sleep_until(began + gap * turn).await;
            routers.spawn(async move {
                let began = Instant::now();
                let mut status = ask_once(target, number).await;
                let first = status.map(|_| began.elapsed());
                let mut again = 0;
                while status != Some(200) && again < TIMES {
                    sleep(AGAIN).await;
                    status = ask_once(target, number).await;
                    again += 1;
                }
                (status, again, first)
            });
        }
        let mut all = Answers::default();
        while let Some(router) = routers.join_next().await {
            let (status, again, first) = router.expect("a router that ends well");
            *match (status, again) {
                (Some(200), 0) => &mut all.good,
                (Some(200), _) => &mut all.later,
                _ => &mut all.bad,
            } += 1;
            all.times.extend(first);
        }
        all
    })
}

/// The status of the answer; none after the router's timeout.
async fn ask_once(target: Target, number: u32) -> Option<u16> {
    let answer = async { post(&mut connect(target.server).await?, target, number).await };
    timeout(PATIENCE, answer).await.ok()?.ok()
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

/// POSTs a key; returns the status once the whole answer is read.
async fn post(stream: &mut TcpStream, target: Target, number: u32) -> std::io::Result<u16> {
    many_routers::post(stream, target.path, "", &ask(target.domain, &key(number).to_string())).await
}
