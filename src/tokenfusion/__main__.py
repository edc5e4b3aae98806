from tokenfusion.cli import main

main()
